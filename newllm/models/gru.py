"""Gru: gated recurrent units over normed token embeddings, the classical recurrence that others are compared with.

R: hidden units of the recurrence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from newllm.config.fields import Depth, Range
from newllm.config.schema import ModelConfig
from newllm.layers.context_block import initialise
from newllm.linear import Linear, linear
from newllm.models.base import LanguageModel, ModelOutput
from newllm.state import State


@dataclass(frozen=True, kw_only=True)
class GruConfig(ModelConfig):
    """Gated recurrent units, trained by back-propagation through time inside one call.

    Attributes:
        dim: width of token embeddings and states.
        hidden_dim: units of every recurrent layer; null for the number that gives one layer the parameters of a context block and a
            token block, both `dim` wide.
        num_layers: recurrent layers.
    """

    dim: Annotated[int, Range(minimum=1)]
    hidden_dim: Annotated[int | None, Range(minimum=1)]
    num_layers: Depth

    @property
    def units(self) -> int:
        """Units of every recurrent layer: 3 (D R + R^2) + R D = 4 D^2 at R = 2 D / 3."""
        return self.hidden_dim or max(1, round(2 * self.dim / 3))


@dataclass(frozen=True)
class GruState(State):
    """Hidden units of every layer after the last token [B, L, R], and tokens read per row."""

    units: Tensor
    positions: tuple[int, ...]


class Gru(LanguageModel):
    """h = LN(x + W GRU(x)), x = LN(E[token]); scores are products of h with the token embeddings.

    The recurrence is the layers' own: nothing is fed back from h, and a whole block takes one call.

    Args:
        vocab_size: tokens.
        config: sizes.
    Source: Cho et al. (2014), as torch computes it: the reset gate acts on the product with the hidden units.
    """

    def __init__(self, vocab_size: int, config: GruConfig) -> None:
        super().__init__()
        self.vocab_size, self.dim, self.config = vocab_size, config.dim, config
        self.embedding = nn.Embedding(vocab_size, config.dim)
        self.embedding_norm = nn.LayerNorm(config.dim)
        self.gru = nn.GRU(config.dim, config.units, config.num_layers, batch_first=True)
        self.output = Linear(config.units, config.dim)
        self.norm = nn.LayerNorm(config.dim)
        initialise(self)

    def initial_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> GruState:
        like = self.embedding.weight.new_empty(0, device=device, dtype=dtype)
        return GruState(like.new_zeros(batch_size, self.config.num_layers, self.config.units), (0,) * batch_size)

    def encode(
        self,
        input_ids: Tensor,
        state: GruState,
        *,
        previous_hidden: Tensor | None = None,
        update_memory: bool = True,
        use_feedback: bool = True,
    ) -> ModelOutput:
        tokens = self.embedding_norm(self.embedding(input_ids))
        start = state.units.transpose(0, 1).contiguous()  # [B, L, R] -> [L, B, R]
        recurrent, last = self.gru(tokens, start)
        hidden = self.norm(tokens + self.output(recurrent))
        positions = tuple(position + input_ids.shape[1] for position in state.positions)
        return ModelOutput(None, hidden, GruState(last.transpose(0, 1), positions))

    def logits(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.embedding.weight)

    def flops_per_token(self, length: int) -> float:
        gates = sum(weight.numel() for name, weight in self.gru.named_parameters() if name.startswith("weight"))
        return 2 * (gates + self.output.weight.numel() + self.embedding.weight.numel())

    def state_bytes(self, length: int) -> int:
        return 4 * self.config.num_layers * self.config.units


def build(config: Any, vocab_size: int) -> Gru:
    """Return the model that a configuration describes, with random weights."""
    return Gru(vocab_size, config.model)
