"""TokenWindow: predicts from the last k tokens and nothing else; what a model with a memory has to beat.

k: token embeddings that enter a position.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from newllm.config.fields import Depth, Range
from newllm.config.schema import ModelConfig
from newllm.layers.context_block import TokenLayer, initialise
from newllm.linear import linear
from newllm.models.base import LanguageModel, ModelOutput
from newllm.models.context_state import token_window
from newllm.state import State


@dataclass(frozen=True, kw_only=True)
class TokenWindowConfig(ModelConfig):
    """The token block of a context model without its context.

    Attributes:
        dim: width of token embeddings and states.
        num_layers: layers, which narrow k embeddings evenly to one.
        num_input_tokens: k, the token of the position included.
        ffn_layers: linear maps of each layer's feed-forward part.
        ffn_expand: its inner width over its input's, with two maps.
    """

    dim: Annotated[int, Range(minimum=1)]
    num_layers: Depth
    num_input_tokens: Annotated[int, Range(minimum=1)]
    ffn_layers: Annotated[int, Range(minimum=1, maximum=2)]
    ffn_expand: Annotated[int, Range(minimum=1)]


@dataclass(frozen=True)
class TokenWindowState(State):
    """Normed embeddings that the next position still reads [B, k - 1, D], zeros before a text begins; and tokens read per row."""

    window: Tensor
    positions: tuple[int, ...]


class TokenWindow(LanguageModel):
    """h = TokenLayers(x_{t-k+1} .. x_t), x = LN(E[token]); scores are products of h with the token embeddings.

    With one token it is a context model whose context is always zero: its layers compute what a token block computes there.

    Args:
        vocab_size: tokens.
        config: sizes.
    """

    def __init__(self, vocab_size: int, config: TokenWindowConfig) -> None:
        super().__init__()
        self.vocab_size, self.dim, self.config = vocab_size, config.dim, config
        self.embedding = nn.Embedding(vocab_size, config.dim)
        self.embedding_norm = nn.LayerNorm(config.dim)
        surplus = config.dim * (config.num_input_tokens - 1)
        widths = [config.dim + surplus - surplus * depth // config.num_layers for depth in range(config.num_layers + 1)]
        self.layers = nn.ModuleList(
            TokenLayer(0, *pair, ffn_layers=config.ffn_layers, ffn_expand=config.ffn_expand)
            for pair in pairwise(widths)
        )
        initialise(self)

    def initial_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> TokenWindowState:
        like = self.embedding.weight.new_empty(0, device=device, dtype=dtype)
        window = like.new_zeros(batch_size, self.config.num_input_tokens - 1, self.dim)
        return TokenWindowState(window, (0,) * batch_size)

    def encode(
        self,
        input_ids: Tensor,
        state: TokenWindowState,
        *,
        previous_hidden: Tensor | None = None,
        update_memory: bool = True,
        use_feedback: bool = True,
    ) -> ModelOutput:
        hidden, window = token_window(self.embedding_norm(self.embedding(input_ids)), state.window)
        for layer in self.layers:
            hidden = layer(hidden, context=None)
        positions = tuple(position + input_ids.shape[1] for position in state.positions)
        return ModelOutput(None, hidden, TokenWindowState(window, positions))

    def logits(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.embedding.weight)

    def flops_per_token(self, length: int) -> float:
        linears = sum(part.weight.numel() for part in self.modules() if isinstance(part, nn.Linear))
        return 2 * (linears + self.embedding.weight.numel())

    def state_bytes(self, length: int) -> int:
        return 4 * (self.config.num_input_tokens - 1) * self.dim


def build(config: Any, vocab_size: int) -> TokenWindow:
    """Return the model that a configuration describes, with random weights."""
    return TokenWindow(vocab_size, config.model)
