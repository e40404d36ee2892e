"""ContextPythia: attention over contexts instead of tokens, so that what is kept of each token can be narrower than the model.

C: context size. W: width of the attention layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from newllm.config.fields import Depth, Range, divisors
from newllm.config.schema import ModelConfig
from newllm.layers.base import Layer
from newllm.layers.build import build_stack
from newllm.layers.context_block import ContextBlock, initialise
from newllm.linear import Linear
from newllm.models.base import LanguageModel, LinearHead, ModelOutput
from newllm.models.context_state import ContextState
from newllm.state import State


@dataclass(frozen=True, kw_only=True)
class ContextPythiaConfig(ModelConfig):
    """Layers over the contexts of a context block.

    Attributes:
        dim: width of the token embeddings, and of the layers with width "model".
        context_dim: width of the context; null is half of dim.
        width: the layers are as wide as "model" or as "context": the second keeps fewer bytes of every token.
        num_layers: layers over the contexts, where the stack leaves it open with `rest`.
        num_heads: attention heads; divides the layers' width.
        mlp_dim: width of the layers' MLPs.
        context_layers: layers of the context block.
        ffn_layers: linear maps of each context layer's feed-forward part.
        ffn_expand: its inner width over its input's, with two maps.
    """

    dim: Annotated[int, Range(minimum=1)]
    context_dim: Annotated[int | None, Range(minimum=1)]
    width: Literal["model", "context"]
    num_layers: Depth
    num_heads: Annotated[int, Range(minimum=1)]
    mlp_dim: Annotated[int, Range(minimum=1)]
    context_layers: Annotated[int, Range(minimum=1)]
    ffn_layers: Literal[1, 2]
    ffn_expand: Annotated[int, Range(minimum=1)]

    @property
    def has_feedback(self) -> bool:
        """Whether the last state enters the next position: the context always does."""
        return True

    def is_pointwise(self, layers: Any) -> bool:
        """Whether contexts are made of the context before and tokens alone: always."""
        return True

    @property
    def context_width(self) -> int:
        """C."""
        return self.dim // 2 if self.context_dim is None else self.context_dim

    @property
    def layer_width(self) -> int:
        """W."""
        return self.dim if self.width == "model" else self.context_width

    def check(self, config: Any) -> list[str]:
        """Return what is wrong between these values."""
        width = self.layer_width
        if width > 0 and width % self.num_heads == 0:
            return []
        return [
            f"model.num_heads={self.num_heads}: does not divide the layers' width {width} (model.width={self.width}). "
            f"Allowed: {divisors(width)}. Set model.num_heads to one of these or change model.context_dim."
        ]


@dataclass(frozen=True)
class ContextPythiaState(ContextState):
    """A context state, and the state of every layer over the contexts."""

    layers: tuple[State, ...]


class ContextPythia(LanguageModel):
    """c_t = ContextBlock(c_{t-1}, x_t); layers over P c_1 .. P c_t; scores = W LN(result).

    The states of the recurrence are [c; h], C + W wide: the context, which alone is read from the position before, and the layers'
    result, which scores are computed from.

    Args:
        vocab_size: tokens.
        config: sizes and choices.
        layers: the stack over the contexts, from the bottom.
    """

    has_feedback = True

    def __init__(self, vocab_size: int, config: ContextPythiaConfig, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.vocab_size, self.config = vocab_size, config
        self.context_dim, self.layer_dim = config.context_width, config.layer_width
        self.dim = self.context_dim + self.layer_dim
        self.embedding = nn.Embedding(vocab_size, config.dim)
        self.embedding_norm = nn.LayerNorm(config.dim)
        self.context_block = ContextBlock(
            self.context_dim,
            config.dim,
            num_layers=config.context_layers,
            ffn_layers=config.ffn_layers,
            ffn_expand=config.ffn_expand,
        )
        self.projection = Linear(self.context_dim, self.layer_dim, bias=False)
        self.layers = nn.ModuleList(layers)
        self.final_norm = nn.LayerNorm(self.layer_dim)
        self.head = Linear(self.layer_dim, vocab_size, bias=False)
        initialise(self)

    @property
    def carried_dim(self) -> int:
        return self.context_dim

    def initial_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> ContextPythiaState:
        like = self.embedding.weight.new_empty(0, device=device, dtype=dtype)
        return ContextPythiaState(
            like.new_zeros(batch_size, self.context_dim),
            like.new_zeros(batch_size, 0, self.config.dim),
            (0,) * batch_size,
            self.layer_dim,
            tuple(layer.initial_state(batch_size, device=like.device, dtype=like.dtype) for layer in self._layers()),
        )

    def encode(
        self,
        input_ids: Tensor,
        state: ContextPythiaState,
        *,
        previous_hidden: Tensor | None = None,
        update_memory: bool = True,
        use_feedback: bool = True,
    ) -> ModelOutput:
        assert previous_hidden is not None, "encode is one sweep: a context model needs the previous states"
        previous_context = previous_hidden[..., : self.context_dim]
        if not use_feedback:
            previous_context = torch.zeros_like(previous_context)
        context = self.context_block(previous_context, tokens=self.embedding_norm(self.embedding(input_ids)))[-1]
        hidden, states = self.projection(context), []
        for layer, layer_state in zip(self._layers(), state.layers, strict=True):
            hidden, layer_state = layer(hidden, layer_state, update_memory=update_memory)
            states.append(layer_state)
        length = input_ids.shape[1]
        positions = tuple(position + length for position in state.positions)
        next_state = ContextPythiaState(context[:, -1], state.window, positions, self.layer_dim, tuple(states))
        return ModelOutput(None, torch.cat([context, hidden], dim=-1), next_state)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(self.final_norm(hidden[..., self.context_dim :]))

    def linear_head(self, hidden: Tensor) -> LinearHead:
        return LinearHead(self.final_norm(hidden[..., self.context_dim :]), self.head.weight, None)

    def flops_per_token(self, length: int) -> float:
        once = [self.projection, self.head, *self.context_block.modules()]
        linears = sum(part.weight.numel() for part in once if isinstance(part, nn.Linear))
        return 2 * linears + sum(layer.flops_per_token(length) for layer in self._layers())

    def state_bytes(self, length: int) -> int:
        return 4 * self.context_dim + sum(layer.state_bytes(length) for layer in self._layers())

    def _layers(self) -> list[Layer]:
        return list(self.layers)  # type: ignore[arg-type]  # ModuleList forgets what it holds


def build(config: Any, vocab_size: int) -> ContextPythia:
    """Return the model that a configuration describes, with random weights."""
    options: ContextPythiaConfig = config.model
    layers = build_stack(config.layers, options.layer_width, options.num_heads, options.mlp_dim)
    return ContextPythia(vocab_size, options, layers)
