"""TrmLM: one small network that refines an answer and a latent of every token, over and over.

n: latent steps of a cycle. C: cycles (deep steps) of a supervision step. N: supervision steps. A: applications of a block to a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from newllm.config.fields import Depth, Range, not_dividing
from newllm.config.schema import ModelConfig
from newllm.layers.tiny_block import TinyBlock
from newllm.linear import Linear
from newllm.models.base import LanguageModel, LinearHead, ModelOutput
from newllm.models.transformer import initialise
from newllm.state import State, by_groups


@dataclass(frozen=True, kw_only=True)
class TrmConfig(ModelConfig):
    """A recursive model.

    Attributes:
        dim: hidden size.
        num_layers: blocks of the one network.
        num_heads: attention heads; divides `dim`.
        mlp_dim: width of the MLPs.
        max_positions: tokens of the longest text.
        latent_steps: updates of latent and answer in a cycle.
        deep_steps: cycles of a supervision step; all but the last run without gradient.
        supervision_steps: times that the answer is scored, and goes on from there without gradient.
    """

    dim: Annotated[int, Range(minimum=1)]
    num_layers: Depth
    num_heads: Annotated[int, Range(minimum=1)]
    mlp_dim: Annotated[int, Range(minimum=1)]
    max_positions: Annotated[int, Range(minimum=4)]  # the guards read two tokens twice
    latent_steps: Depth
    deep_steps: Depth
    supervision_steps: Depth

    def check(self, config: Any) -> list[str]:
        """Return what is wrong between these values."""
        return not_dividing("model.num_heads", self.num_heads, "model.dim", self.dim)


@dataclass(frozen=True)
class TrmState(State):
    """Keys and values [B, A*H, L, d] of every application of a block, right-aligned, and tokens read per row."""

    keys: Tensor = field(metadata={"ragged": True})
    values: Tensor = field(metadata={"ragged": True})
    positions: tuple[int, ...]


@dataclass(frozen=True)
class TrmOutput(ModelOutput):
    """What `encode` returns: `hidden` is the last answer, `levels` [B, T, N, D] the answer after every supervision step."""

    levels: Tensor


class _Caches:
    """Hands every application the keys and values of its own turn, and collects what it gives back."""

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
        self._past: Iterator[tuple[Tensor, Tensor]] = iter(zip(keys, values, strict=True))
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def apply(self, blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
        """Return the blocks' result, one after another."""
        for block in blocks:
            hidden, keys, values = block(hidden, *next(self._past))
            self.keys.append(keys)
            self.values.append(values)
        return hidden


class TrmLM(LanguageModel):
    """x = E(token) + P(position), y = x, z = 0; z <- net(x, y, z) and y <- net(y, z) in turn; scores are products of y with E.

    net(a) = TinyBlocks(Linear(a)), the blocks are the same for both. All supervision steps are made wherever the model is used:
    the deepest answer that is trained is the one deployed. Each application attends to the same application at earlier tokens, so
    a text read token by token carries keys and values of every application: the state grows with A.

    Args:
        vocab_size: tokens.
        dim: hidden size.
        num_layers: blocks of the network.
        num_heads: heads; divides `dim`.
        mlp_dim: width of the MLPs.
        max_positions: tokens of the longest text.
        latent_steps: n.
        deep_steps: C.
        supervision_steps: N.
    Source: Tiny Recursive Model (Jolicoeur-Martineau, 2025), fig. 3. Differs: causal, over every token; the answer is updated after
    each update of the latent; halting is judged per token; one optimizer step for all supervision steps.
    """

    max_positions: int
    tied_parameters = (("embedding.weight", "head.weight"),)

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        max_positions: int,
        latent_steps: int,
        deep_steps: int,
        supervision_steps: int,
    ) -> None:
        super().__init__()
        self.vocab_size, self.dim, self.num_heads, self.max_positions = vocab_size, dim, num_heads, max_positions
        self.latent_steps, self.deep_steps, self.supervision_steps = latent_steps, deep_steps, supervision_steps
        self.embedding = nn.Embedding(vocab_size, dim)
        self.position = nn.Embedding(max_positions, dim)
        self.latent_input = Linear(3 * dim, dim)
        self.answer_input = Linear(2 * dim, dim)
        self.blocks = nn.ModuleList(TinyBlock(dim, num_heads, mlp_dim) for _ in range(num_layers))
        self.halting_gate = Linear(dim, 1)
        self.head = Linear(dim, vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        self.apply(initialise)
        # Answers leave a LayerNorm, so scores need a small E: at N(0, 1) the first loss is several times ln V.
        # Entering, the same small E would be lost beside answer and latent.
        self.input_scale = math.sqrt(dim)

    @property
    def num_applications(self) -> int:
        """Applications of a block to a token, A."""
        return 2 * self.latent_steps * self.deep_steps * self.supervision_steps * len(self.blocks)

    def initial_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> TrmState:
        weight = self.embedding.weight
        shape = (batch_size, self.num_applications * self.num_heads, 0, self.dim // self.num_heads)
        empty = torch.zeros(shape, device=device or weight.device, dtype=dtype or weight.dtype)
        return TrmState(empty, empty, (0,) * batch_size)

    def encode(
        self,
        input_ids: Tensor,
        state: TrmState,
        *,
        previous_hidden: Tensor | None = None,
        update_memory: bool = True,
        use_feedback: bool = True,
    ) -> TrmOutput:
        assert previous_hidden is None, "a model without feedback reads no previous states"
        return self.refine(input_ids, state)

    def refine(self, input_ids: Tensor, state: TrmState, *, unrolled: bool = False) -> TrmOutput:
        """Return the answers after every supervision step and the next state.

        Args:
            input_ids: tokens [B, T].
            state: what `initial_state` or the previous call returned.
            unrolled: keep the gradient through all cycles of all supervision steps; otherwise through the last cycle of each.
        Raises:
            ValueError: the text is longer than the model has positions.
        """
        last = max(state.positions) + input_ids.shape[1]
        if last > self.max_positions:
            raise ValueError(
                f"input_ids: reach {last} tokens, the model has positions for {self.max_positions}. "
                f"Allowed: up to {self.max_positions} tokens. Shorten the text or train with a larger model.max_positions."
            )

        def run(ids: Tensor, rows: TrmState) -> tuple[Tensor, TrmState]:
            return self._refine(ids, rows, unrolled)

        levels_BTND, next_state = by_groups(run, input_ids, state, state.positions)
        return TrmOutput(None, levels_BTND[:, :, -1], next_state, levels_BTND)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)

    def linear_head(self, hidden: Tensor) -> LinearHead:
        return LinearHead(hidden, self.head.weight, None)

    def halting_logits(self, levels_BTND: Tensor) -> Tensor:
        """Return, before the sigmoid, how sure the model is that more steps do not help a token [B, T, N]."""
        return self.halting_gate(levels_BTND).squeeze(-1)

    def flops_per_token(self, length: int) -> float:
        inputs = 2 * (self.latent_input.weight.numel() + self.answer_input.weight.numel())
        pairs = self.latent_steps * self.deep_steps * self.supervision_steps
        block: TinyBlock = self.blocks[0]  # type: ignore[assignment]  # ModuleList forgets what it holds
        blocks = self.num_applications * block.flops_per_token(length)
        return pairs * inputs + blocks + 2 * self.head.weight.numel()

    def training_flops_per_token(self, length: int) -> float:
        """Cycles without gradient cost a pass only; every supervision step's answer is scored and judged, and the way back from it."""
        head = self.head_flops_per_token()
        cycles = self.flops_per_token(length) - head
        scores = self.supervision_steps * (head + 2 * self.halting_gate.weight.numel())
        return cycles * (1 + 2 / self.deep_steps) + 3 * scores

    def state_bytes(self, length: int) -> int:
        return self.num_applications * 2 * length * self.dim * 4

    def _refine(self, input_ids: Tensor, state: TrmState, unrolled: bool) -> tuple[Tensor, TrmState]:
        """Answers [B, T, N, D] and the next state, for rows that have read equally many tokens."""
        past, length = state.positions[0], input_ids.shape[1]
        start = state.keys.shape[2] - past
        caches = _Caches(
            list(state.keys[:, :, start:].unflatten(1, (self.num_applications, self.num_heads)).unbind(1)),
            list(state.values[:, :, start:].unflatten(1, (self.num_applications, self.num_heads)).unbind(1)),
        )
        places = torch.arange(past, past + length, device=input_ids.device)
        embedded = self.input_scale * (self.embedding(input_ids) + self.position(places))
        answer, latent = embedded, torch.zeros_like(embedded)
        answers = []
        for _ in range(self.supervision_steps):
            for cycle in range(self.deep_steps):
                is_free = not unrolled and cycle < self.deep_steps - 1
                with torch.no_grad() if is_free else nullcontext():
                    answer, latent = self._cycle(embedded, answer, latent, caches)
            answers.append(answer)
            if not unrolled:
                answer, latent = answer.detach(), latent.detach()
        positions = tuple(position + length for position in state.positions)
        next_state = TrmState(torch.cat(caches.keys, dim=1), torch.cat(caches.values, dim=1), positions)
        return torch.stack(answers, dim=2), next_state

    def _cycle(self, embedded: Tensor, answer: Tensor, latent: Tensor, caches: _Caches) -> tuple[Tensor, Tensor]:
        for _ in range(self.latent_steps):
            latent = caches.apply(self.blocks, self.latent_input(torch.cat([embedded, answer, latent], dim=-1)))
            answer = caches.apply(self.blocks, self.answer_input(torch.cat([answer, latent], dim=-1)))
        return answer, latent


def build(config: Any, vocab_size: int) -> TrmLM:
    """Return the model that a configuration describes, with random weights."""
    options: TrmConfig = config.model
    return TrmLM(
        vocab_size,
        options.dim,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        mlp_dim=options.mlp_dim,
        max_positions=options.max_positions,
        latent_steps=options.latent_steps,
        deep_steps=options.deep_steps,
        supervision_steps=options.supervision_steps,
    )
