"""NewLLM: a feed-forward network over a token and a context, which it changes a little at every position.

C: context size. F: hidden units of the feed-forward network.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from newllm.config.fields import Depth, Range
from newllm.config.schema import ModelConfig
from newllm.layers.context_block import initialise
from newllm.layers.context_update import ContextUpdate
from newllm.linear import Linear
from newllm.models.base import LanguageModel, LinearHead, ModelOutput
from newllm.models.context_state import ContextState


@dataclass(frozen=True, kw_only=True)
class NewLlmConfig(ModelConfig):
    """A context that is added to, or updated in a way that holds it.

    Attributes:
        dim: width of token and position embeddings.
        context_dim: width of the context.
        hidden_dim: units of every layer of the feed-forward network.
        num_layers: its layers.
        num_positions: learned positions, of which the last stands for all that follow; null leaves positions out.
        update: how the proposed change enters the context.
    """

    dim: Annotated[int, Range(minimum=1)]
    context_dim: Annotated[int, Range(minimum=1)]
    hidden_dim: Annotated[int, Range(minimum=1)]
    num_layers: Depth
    num_positions: Annotated[int | None, Range(minimum=1)]
    update: Literal["additive", "convex", "dual", "ema", "gated", "layernorm"]

    @property
    def has_feedback(self) -> bool:
        """Whether the last state enters the next position: the context always does."""
        return True

    def is_pointwise(self, layers: Any) -> bool:
        """Whether contexts are made of the context before and tokens alone: always."""
        return True

    def check(self, config: Any) -> list[str]:
        """Return what is wrong between these values."""
        if self.update != "dual" or self.context_dim % 2 == 0:
            return []
        return [
            f"model.context_dim={self.context_dim}: has no halves, which model.update=dual needs. Allowed: even numbers. "
            f"Set model.context_dim={self.context_dim + 1} or choose another update."
        ]


class NewLlm(LanguageModel):
    """h = FFN([x_t + position_t; c_{t-1}]) with ReLU; scores = W h; c_t = update(c_{t-1}, h).

    The states of the recurrence are [c; h], C + F wide: the context, which alone is read from the position before, and the hidden
    units, which scores are computed from.

    Args:
        vocab_size: tokens.
        config: sizes and choices.
    """

    has_feedback = True

    def __init__(self, vocab_size: int, config: NewLlmConfig) -> None:
        super().__init__()
        self.vocab_size, self.config = vocab_size, config
        self.context_dim, self.hidden_dim = config.context_dim, config.hidden_dim
        self.dim = config.context_dim + config.hidden_dim
        self.embedding = nn.Embedding(vocab_size, config.dim)
        self.positions = None if config.num_positions is None else nn.Embedding(config.num_positions, config.dim)
        widths = [config.dim + config.context_dim, *[config.hidden_dim] * config.num_layers]
        self.layers = nn.ModuleList(Linear(*pair) for pair in pairwise(widths))
        self.update = ContextUpdate(config.context_dim, config.hidden_dim, config.update)
        self.head = Linear(config.hidden_dim, vocab_size)
        initialise(self)

    @property
    def carried_dim(self) -> int:
        return self.context_dim

    def initial_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> ContextState:
        like = self.embedding.weight.new_empty(0, device=device, dtype=dtype)
        window = like.new_zeros(batch_size, 0, self.config.dim)
        return ContextState(like.new_zeros(batch_size, self.context_dim), window, (0,) * batch_size, self.hidden_dim)

    def encode(
        self,
        input_ids: Tensor,
        state: ContextState,
        *,
        previous_hidden: Tensor | None = None,
        update_memory: bool = True,
        use_feedback: bool = True,
    ) -> ModelOutput:
        assert previous_hidden is not None, "encode is one sweep: a context model needs the previous states"
        previous_context = previous_hidden[..., : self.context_dim]
        if not use_feedback:
            previous_context = torch.zeros_like(previous_context)
        hidden = torch.cat([self._embed(input_ids, state.positions), previous_context], dim=-1)
        for layer in self.layers:
            hidden = torch.relu(layer(hidden))
        context = self.update(previous_context, hidden)
        length = input_ids.shape[1]
        positions = tuple(position + length for position in state.positions)
        next_state = ContextState(context[:, -1], state.window, positions, self.hidden_dim)
        return ModelOutput(None, torch.cat([context, hidden], dim=-1), next_state)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden[..., self.context_dim :])

    def linear_head(self, hidden: Tensor) -> LinearHead:
        return LinearHead(hidden[..., self.context_dim :], self.head.weight, self.head.bias)

    def flops_per_token(self, length: int) -> float:
        return 2 * sum(part.weight.numel() for part in self.modules() if isinstance(part, nn.Linear))

    def state_bytes(self, length: int) -> int:
        return 4 * self.context_dim

    def _embed(self, input_ids: Tensor, starts: tuple[int, ...]) -> Tensor:
        """Embeddings of tokens and of their positions, which rows count on from where each of them stands [B, T, D]."""
        embedded = self.embedding(input_ids)
        if self.positions is None:
            return embedded
        offsets = torch.arange(input_ids.shape[1], device=input_ids.device)
        places = torch.tensor(starts, device=input_ids.device).unsqueeze(1) + offsets  # [B, T]
        return embedded + self.positions(places.clamp_max(self.positions.num_embeddings - 1))


def build(config: Any, vocab_size: int) -> NewLlm:
    """Return the model that a configuration describes, with random weights."""
    return NewLlm(vocab_size, config.model)
