"""Context and token blocks: small feed-forward layers that carry a context from position to position and predict from it.

C: context size. k: token embeddings that enter a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from newllm.linear import Linear

Plan = Literal["A", "E", "F", "G", "none"]
Source = Literal["own", "last", "previous", "none"]


class FeedForward(nn.Module):
    """Linear maps, each followed by the exact GELU, the last one too: what it adds to a residual is at least -0.17.

    Args:
        in_dim: width of the input.
        out_dim: width of the output.
        num_layers: linear maps.
        expand: width between them over `in_dim`.
    """

    def __init__(self, in_dim: int, out_dim: int, *, num_layers: int, expand: int) -> None:
        super().__init__()
        widths = [in_dim, *[expand * in_dim] * (num_layers - 1), out_dim]
        self.linears = nn.ModuleList(Linear(*pair) for pair in pairwise(widths))

    def forward(self, hidden: Tensor) -> Tensor:
        for linear in self.linears:
            hidden = nn.functional.gelu(linear(hidden))
        return hidden


class ContextLayer(nn.Module):
    """c' = LN(c + FFN([c; u])), position by position.

    Args:
        context_dim: C.
        token_dim: width of the tokens' input u, k embeddings side by side.
        ffn_layers: linear maps of the feed-forward part.
        ffn_expand: its inner width over its input's.
    """

    def __init__(self, context_dim: int, token_dim: int, *, ffn_layers: int, ffn_expand: int) -> None:
        super().__init__()
        self.ffn = FeedForward(context_dim + token_dim, context_dim, num_layers=ffn_layers, expand=ffn_expand)
        # Without it contexts grow from position to position until they overflow.
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, context: Tensor, *, tokens: Tensor) -> Tensor:
        return self.norm(context + self.ffn(torch.cat([context, tokens], dim=-1)))


class TokenLayer(nn.Module):
    """h' = LN(r(h) + FFN([c; h])), r the identity, or linear where the widths differ.

    Args:
        context_dim: C; 0 where the layer reads no context.
        in_dim: width of h.
        out_dim: width of h'.
        ffn_layers: linear maps of the feed-forward part.
        ffn_expand: its inner width over its input's.
    """

    def __init__(self, context_dim: int, in_dim: int, out_dim: int, *, ffn_layers: int, ffn_expand: int) -> None:
        super().__init__()
        self.ffn = FeedForward(context_dim + in_dim, out_dim, num_layers=ffn_layers, expand=ffn_expand)
        self.residual = nn.Identity() if in_dim == out_dim else Linear(in_dim, out_dim)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, hidden: Tensor, *, context: Tensor | None) -> Tensor:
        read = hidden if context is None else torch.cat([context, hidden], dim=-1)
        return self.norm(self.residual(hidden) + self.ffn(read))


class ContextBlock(nn.Module):
    """From the previous position's context and a position's tokens to its contexts c^1 .. c^L; the tokens enter every layer.

    Rows are independent: nothing passes between positions but the context that is given.

    Args:
        context_dim: C.
        token_dim: width of the tokens' input.
        num_layers: L.
        ffn_layers: linear maps of each layer's feed-forward part.
        ffn_expand: its inner width over its input's.
    """

    def __init__(self, context_dim: int, token_dim: int, *, num_layers: int, ffn_layers: int, ffn_expand: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ContextLayer(context_dim, token_dim, ffn_layers=ffn_layers, ffn_expand=ffn_expand)
            for _ in range(num_layers)
        )

    def forward(self, previous_context: Tensor, *, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return the contexts of all layers, each [..., C]; the last one is what the next position receives.

        Args:
            previous_context: last layer's context of the position before [..., C].
            tokens: the position's tokens [..., k*D].
        """
        contexts = [previous_context]
        for layer in self.layers:
            contexts.append(layer(contexts[-1], tokens=tokens))
        return tuple(contexts[1:])


def context_sources(plan: Plan, num_layers: int) -> list[Source]:
    """Return which context each layer of a token block reads: its own depth's, the last layer's, that of the position before, or none.

    With one layer all plans that read one are the same.
    """
    if plan == "none":
        return ["none"] * num_layers
    if num_layers == 1:
        return ["last"]
    if plan == "E":
        return ["own"] * num_layers
    if plan == "A":
        return ["last"] * num_layers
    if plan == "F":
        return ["last", *["none"] * (num_layers - 1)]  # type: ignore[list-item]  # a list of words, widened by *
    return ["previous", *["none"] * (num_layers - 2), "last"]  # type: ignore[list-item]


class TokenBlock(nn.Module):
    """From a position's tokens and contexts to the state that its prediction is read from.

    Args:
        context_dim: C.
        token_dim: D; the tokens' input is k embeddings wide, and the layers narrow it evenly to one.
        num_input_tokens: k.
        num_layers: L, as many as the context block has.
        ffn_layers: linear maps of each layer's feed-forward part.
        ffn_expand: its inner width over its input's.
        plan: which contexts the layers read.
    """

    def __init__(
        self,
        context_dim: int,
        token_dim: int,
        *,
        num_input_tokens: int,
        num_layers: int,
        ffn_layers: int,
        ffn_expand: int,
        plan: Plan,
    ) -> None:
        super().__init__()
        self.sources = context_sources(plan, num_layers)
        surplus = token_dim * (num_input_tokens - 1)
        widths = [token_dim + surplus - surplus * depth // num_layers for depth in range(num_layers + 1)]
        self.layers = nn.ModuleList(
            TokenLayer(0 if source == "none" else context_dim, *pair, ffn_layers=ffn_layers, ffn_expand=ffn_expand)
            for source, pair in zip(self.sources, pairwise(widths), strict=True)
        )

    def forward(self, tokens: Tensor, *, contexts: Sequence[Tensor], previous_context: Tensor) -> Tensor:
        """Return states [..., D].

        Args:
            tokens: the position's tokens [..., k*D].
            contexts: of all layers of the context block, each [..., C].
            previous_context: last layer's context of the position before [..., C].
        """
        hidden = tokens
        for layer, source, own in zip(self.layers, self.sources, contexts, strict=True):
            read = {"own": own, "last": contexts[-1], "previous": previous_context, "none": None}[source]
            hidden = layer(hidden, context=read)
        return hidden


def initialise(module: nn.Module, *, weight_std: float = 0.02, bias_std: float = 0.0) -> None:
    """Draw every linear map's weights and biases, and every embedding (always with 0.02), from normal distributions around 0."""
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=weight_std)
            if part.bias is not None:
                nn.init.normal_(part.bias, std=bias_std)
