"""TransformerLM: token embedding, a stack of layers of any kinds, a norm and an untied head; optionally fed back its own state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from newllm.config.fields import Depth, Range, not_dividing
from newllm.config.schema import ModelConfig
from newllm.layers.base import Layer
from newllm.layers.build import build_stack
from newllm.layers.feedback import Feedback, FeedbackKind
from newllm.linear import Linear
from newllm.models.base import LanguageModel, LinearHead, ModelOutput
from newllm.state import State


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(ModelConfig):
    """A stack of layers.

    Attributes:
        dim: hidden size.
        num_layers: layers, where the stack leaves it open with `rest`.
        num_heads: attention heads; divides `dim`.
        mlp_dim: width of the MLPs.
        feedback: how the last position's state enters the next position's input.
        pretrained: a published checkpoint to start from, by its hub name; null starts from random weights.
    """

    dim: Annotated[int, Range(minimum=1)]
    num_layers: Depth
    num_heads: Annotated[int, Range(minimum=1)]
    mlp_dim: Annotated[int, Range(minimum=1)]
    feedback: Literal["none", "additive", "gated"]
    pretrained: str | None

    def is_pointwise(self, layers: Any) -> bool:
        """Whether earlier states come to a position through the fed-back one alone: where no layer looks back."""
        return self.has_feedback and not any(kind.looks_back for kind in layers.kinds.values())

    def check(self, config: Any) -> list[str]:
        """Return what is wrong between these values."""
        return not_dividing("model.num_heads", self.num_heads, "model.dim", self.dim)


@dataclass(frozen=True)
class TransformerState(State):
    """State of every layer, the last hidden state [B, D] ([B, 0] without feedback), and tokens read per row."""

    layers: tuple[State, ...]
    hidden: Tensor
    positions: tuple[int, ...]


class TransformerLM(LanguageModel):
    """Layers over token embeddings.

    With feedback the state of the position before, the residual stream before the final norm, enters every position's input; the
    model is then a causal map from previous states to states (see newllm/recurrence.py), and run exactly unless told those states.

    Args:
        vocab_size: tokens.
        dim: hidden size.
        layers: the stack, from the bottom.
        feedback: "none", "additive" or "gated".
    """

    def __init__(self, vocab_size: int, dim: int, layers: Sequence[Layer], *, feedback: FeedbackKind = "none") -> None:
        super().__init__()
        self.vocab_size, self.dim = vocab_size, dim
        self.embedding = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(layers)
        self.final_norm = nn.LayerNorm(dim)
        self.head = Linear(dim, vocab_size, bias=False)
        self.feedback = None if feedback == "none" else Feedback(dim, feedback)
        self.has_feedback = self.feedback is not None
        self.apply(initialise)
        if self.feedback is not None:
            self.feedback.start_at_zero()

    def initial_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> TransformerState:
        weight = self.embedding.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        layers = tuple(layer.initial_state(batch_size, device=device, dtype=dtype) for layer in self._layers())
        hidden = torch.zeros(batch_size, self.dim if self.has_feedback else 0, device=device, dtype=dtype)
        return TransformerState(layers, hidden, (0,) * batch_size)

    def encode(
        self,
        input_ids: Tensor,
        state: TransformerState,
        *,
        previous_hidden: Tensor | None = None,
        update_memory: bool = True,
        use_feedback: bool = True,
    ) -> ModelOutput:
        hidden = self.embedding(input_ids)
        if self.feedback is not None and use_feedback:
            assert previous_hidden is not None, "encode is one sweep: a feedback model needs the previous states"
            hidden = self.feedback(hidden, previous_hidden)
        states = []
        for layer, layer_state in zip(self._layers(), state.layers, strict=True):
            hidden, layer_state = layer(hidden, layer_state, update_memory=update_memory)
            states.append(layer_state)
        length = input_ids.shape[1]
        next_state = TransformerState(
            tuple(states),
            hidden[:, -1] if self.has_feedback else state.hidden,
            tuple(position + length for position in state.positions),
        )
        return ModelOutput(None, hidden, next_state)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(self.final_norm(hidden))

    def linear_head(self, hidden: Tensor) -> LinearHead:
        return LinearHead(self.final_norm(hidden), self.head.weight, None)

    def flops_per_token(self, length: int) -> float:
        feedback = 0 if self.feedback is None else self.feedback.flops_per_token()
        layers = sum(layer.flops_per_token(length) for layer in self._layers())
        return feedback + layers + 2 * self.head.weight.numel()

    def state_bytes(self, length: int) -> int:
        hidden = self.dim * 4 if self.has_feedback else 0
        return hidden + sum(layer.state_bytes(length) for layer in self._layers())

    def _layers(self) -> list[Layer]:
        return list(self.layers)  # type: ignore[arg-type]  # ModuleList forgets what it holds


def initialise(module: nn.Module) -> None:
    """Draw weights from N(0, 0.02) and set biases to zero; for `Module.apply`."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def build(config: Any, vocab_size: int) -> TransformerLM:
    """Return the model that a configuration describes, with random weights."""
    options: TransformerConfig = config.model
    layers = build_stack(config.layers, options.dim, options.num_heads, options.mlp_dim)
    return TransformerLM(vocab_size, options.dim, layers, feedback=options.feedback)
