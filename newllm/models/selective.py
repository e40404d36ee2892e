"""SelectiveLM: several steps of one stack per token, of which one emits; the others carry the hidden state over.

s: steps per token at most. Slot (t, j): step j = 0 .. s-1 at token t.

A carry-over step reads no token: its target stays the next one, so the emitting step has seen the tokens up to its own and nothing
else. (Where inputs advance during carry-over steps, the target is soon among them.) All slots of one j are a level; a level reads
its own and lower levels only, at tokens up to its own. A level is therefore one parallel pass over all tokens.

    level 1   P(h) -> (0,1)  (1,1)  (2,1)  -> scores of x_1, x_2, x_3
                        ^      ^      ^
    level 0   E(x) -> (0,0)  (1,0)  (2,0)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from newllm.config.fields import Depth, Range, not_dividing
from newllm.config.schema import ModelConfig
from newllm.layers.base import Layer
from newllm.layers.build import build_stack
from newllm.linear import Linear
from newllm.models.base import LanguageModel, LinearHead, ModelOutput
from newllm.models.transformer import initialise
from newllm.state import State


@dataclass(frozen=True, kw_only=True)
class SelectiveConfig(ModelConfig):
    """A stack that runs several times per token.

    Attributes:
        dim: hidden size.
        num_layers: layers, where the stack leaves it open with `rest`.
        num_heads: attention heads; divides `dim`.
        mlp_dim: width of the MLPs.
        skip_interval: steps per token, of which the last emits; with learned halting the most steps.
        attend: what a step attends to at tokens up to its own: the same and all lower steps, or the same step only.
        carry: what a step after the first starts from: a linear map of the step before ("projection"), its hidden state as it is
            ("identity", with attend=same_level a deeper stack of tied weights), that plus the token's embedding once more
            ("injection"), or a learned vector ("pause").
        halting: "fixed" emits at the last step; "learned" weighs the steps by a gate while training.
        halting_threshold: with learned halting, the step emits whose gate is the first above it, or the last. Not used in training.
    """

    dim: Annotated[int, Range(minimum=1)]
    num_layers: Depth
    num_heads: Annotated[int, Range(minimum=1)]
    mlp_dim: Annotated[int, Range(minimum=1)]
    skip_interval: Depth
    attend: Literal["all_lower", "same_level"]
    carry: Literal["projection", "identity", "injection", "pause"]
    halting: Literal["fixed", "learned"]
    halting_threshold: Annotated[float, Range(minimum=0, maximum=1)]

    @property
    def needs_trainer(self) -> str | None:
        """The trainer without which a part of the model learns nothing: the gate's."""
        return "selective" if self.halting == "learned" else None

    def check(self, config: Any) -> list[str]:
        """Return what is wrong between these values."""
        problems = not_dividing("model.num_heads", self.num_heads, "model.dim", self.dim)
        if self.halting == "learned" and self.skip_interval < 2:
            problems.append(
                f"model.skip_interval={self.skip_interval}: leaves learned halting no step to choose. Allowed: 2 or more. "
                "Raise it or set model.halting=fixed."
            )
        return problems


@dataclass(frozen=True)
class LevelState(State):
    """State of every layer at one level."""

    layers: tuple[State, ...]


@dataclass(frozen=True)
class SelectiveState(State):
    """State of every level, from the lowest, and tokens read per row."""

    levels: tuple[LevelState, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True)
class SelectiveOutput(ModelOutput):
    """What `encode` returns: `hidden` is that of the emitting step of each token, `levels` [B, T, s, D] that of all steps."""

    levels: Tensor


class SelectiveLM(LanguageModel):
    """Steps of one stack over token embeddings; with one step the plain model.

    Level j of an attention layer reads single tokens of the levels up to j. Level j of a memory layer reads and writes a memory of
    its own, in segments of tokens; what lower levels know reaches it by the hidden state that is carried over.

    After learned halting has emitted, the remaining steps of the token still run: later tokens read their keys. The threshold saves
    the wait for a token, not FLOPs, and the cost formulas charge all steps.

    Args:
        vocab_size: tokens.
        dim: hidden size.
        layers: the stack, from the bottom.
        skip_interval: s.
        attend: "all_lower" or "same_level".
        carry: "projection", "identity", "injection" or "pause".
        halting: "fixed" or "learned".
        halting_threshold: gate above which a token is emitted.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        layers: list[Layer],
        *,
        skip_interval: int,
        attend: Literal["all_lower", "same_level"] = "all_lower",
        carry: Literal["projection", "identity", "injection", "pause"] = "projection",
        halting: Literal["fixed", "learned"] = "fixed",
        halting_threshold: float = 0.5,
    ) -> None:
        super().__init__()
        self.vocab_size, self.dim, self.skip_interval = vocab_size, dim, skip_interval
        self.attends_lower, self.injects = attend == "all_lower", carry == "injection"
        self.halting_threshold = halting_threshold
        self.embedding = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(layers)
        self.final_norm = nn.LayerNorm(dim)
        self.head = Linear(dim, vocab_size, bias=False)
        # Drawn before what only this model has: with one step the weights of a seed are those of the plain model.
        self.apply(initialise)
        self.carry_projection: nn.Linear | None = None
        self.pause: nn.Embedding | None = None
        self.halting_gate: nn.Linear | None = None
        if carry == "projection" and skip_interval > 1:
            self.carry_projection = Linear(dim, dim)
            initialise(self.carry_projection)
        if carry == "pause" and skip_interval > 1:
            self.pause = nn.Embedding(skip_interval - 1, dim)
            initialise(self.pause)
        if halting == "learned":
            self.halting_gate = Linear(dim, 1)
            nn.init.zeros_(self.halting_gate.weight)
            nn.init.zeros_(self.halting_gate.bias)

    def initial_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> SelectiveState:
        weight = self.embedding.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        layers = tuple(layer.initial_state(batch_size, device=device, dtype=dtype) for layer in self._layers())
        return SelectiveState((LevelState(layers),) * self.skip_interval, (0,) * batch_size)

    def encode(
        self,
        input_ids: Tensor,
        state: SelectiveState,
        *,
        previous_hidden: Tensor | None = None,
        update_memory: bool = True,
        use_feedback: bool = True,
    ) -> SelectiveOutput:
        assert previous_hidden is None, "a model without feedback reads no previous states"
        embedded = hidden = self.embedding(input_ids)
        shown: list[State | None] = [None] * len(self.layers)
        levels, states = [], []
        for level, level_state in enumerate(state.levels):
            if level > 0:
                hidden = self._carried(hidden, embedded, level)
            hidden, layers, shown = self._run_level(hidden, level_state, shown, update_memory)
            levels.append(hidden)
            states.append(LevelState(layers))
        levels_BTsD = torch.stack(levels, dim=2)
        positions = tuple(position + input_ids.shape[1] for position in state.positions)
        return SelectiveOutput(None, self._emitted(levels_BTsD), SelectiveState(tuple(states), positions), levels_BTsD)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(self.final_norm(hidden))

    def linear_head(self, hidden: Tensor) -> LinearHead:
        return LinearHead(self.final_norm(hidden), self.head.weight, None)

    def halting_logits(self, levels_BTsD: Tensor) -> Tensor:
        """Return the gates before the sigmoid [B, T, s-1]: the last step has none, it emits what is left."""
        assert self.halting_gate is not None, "model.halting=fixed has no gate"
        return self.halting_gate(self.final_norm(levels_BTsD[:, :, :-1])).squeeze(-1)

    def emitting_step(self, levels_BTsD: Tensor, threshold: float) -> Tensor:
        """Return the step [B, T] at which each token is emitted: the first whose gate is above the threshold, or the last."""
        is_above = self.halting_logits(levels_BTsD).sigmoid() > threshold
        return (~is_above).cumprod(dim=-1).sum(dim=-1)

    def flops_per_token(self, length: int) -> float:
        steps = range(self.skip_interval)
        layers = sum(
            layer.level_flops_per_token(length, step if self.attends_lower else 0)
            for step in steps
            for layer in self._layers()
        )
        carry = 0 if self.carry_projection is None else 2 * self.carry_projection.weight.numel()
        gate = 0 if self.halting_gate is None else 2 * self.halting_gate.weight.numel()
        return layers + (self.skip_interval - 1) * (carry + gate) + 2 * self.head.weight.numel()

    def state_bytes(self, length: int) -> int:
        return self.skip_interval * sum(layer.state_bytes(length) for layer in self._layers())

    def _run_level(
        self, hidden: Tensor, state: LevelState, shown: list[State | None], update_memory: bool
    ) -> tuple[Tensor, tuple[State, ...], list[State | None]]:
        """One pass of the stack; `shown` is what each layer lets the level above read."""
        states, next_shown = [], []
        for layer, layer_state, below in zip(self._layers(), state.layers, shown, strict=True):
            hidden, layer_state, own = layer.forward_level(hidden, layer_state, below, update_memory=update_memory)
            states.append(layer_state)
            next_shown.append(own if self.attends_lower else None)
        return hidden, tuple(states), next_shown

    def _carried(self, hidden: Tensor, embedded: Tensor, level: int) -> Tensor:
        """What a step after the first starts from, [B, T, D]."""
        if self.injects:
            return hidden + embedded
        if self.pause is not None:
            return self.pause.weight[level - 1].expand_as(hidden)
        return hidden if self.carry_projection is None else self.carry_projection(hidden)

    def _emitted(self, levels_BTsD: Tensor) -> Tensor:
        if self.halting_gate is None:
            return levels_BTsD[:, :, -1]
        step = self.emitting_step(levels_BTsD, self.halting_threshold)
        index = step[:, :, None, None].expand(-1, -1, 1, self.dim)
        return levels_BTsD.gather(2, index).squeeze(2)

    def _layers(self) -> list[Layer]:
        return list(self.layers)  # type: ignore[arg-type]  # ModuleList forgets what it holds


def build(config: Any, vocab_size: int) -> SelectiveLM:
    """Return the model that a configuration describes, with random weights."""
    options: SelectiveConfig = config.model
    return SelectiveLM(
        vocab_size,
        options.dim,
        build_stack(config.layers, options.dim, options.num_heads, options.mlp_dim),
        skip_interval=options.skip_interval,
        attend=options.attend,
        carry=options.carry,
        halting=options.halting,
        halting_threshold=options.halting_threshold,
    )
