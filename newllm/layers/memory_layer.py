"""What the memory layers share: attention inside segments, and memory of all segments before.

m: queries of a segment that are asked in this call. n: segments side by side.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from newllm.config.fields import Range, not_dividing
from newllm.config.schema import GroupConfig
from newllm.layers import fused_delta
from newllm.layers.banks import Banks, Snapshots
from newllm.layers.base import MLP, Layer
from newllm.layers.kernels import DeltaToken, make_kernel
from newllm.layers.memory import Sums
from newllm.layers.memory_state import MemoryLayerState
from newllm.layers.segments import (
    Segments,
    Tokens,
    as_tokens,
    cut,
    joined,
    linear_attention,
    one_segment,
    softmax_attention,
)
from newllm.linear import Linear
from newllm.state import by_groups


@dataclass(frozen=True, kw_only=True)
class MemoryConfig(GroupConfig):
    """Compressive memory beside attention inside the segment.

    Attributes:
        segment_length: tokens after which the memory is written.
        memory_heads: heads of the memory; divides the hidden size.
        memory_kernel: how associations are stored and read.
        ridge_penalty: of kernel ridge, how much the size of its map counts beside its error, unitless.
        write: "linear" adds every value; "delta" adds what the memory does not already answer; null: as the kernel does.
        local: attention inside the segment.
        mix: "gate" weighs memory and local by a learned gate per head; "joint" gives both one normaliser.
        detach_every: segments after which the gradient through the memory is cut, within a call; null never cuts.
    """

    segment_length: Annotated[int, Range(minimum=1)]
    memory_heads: Annotated[int, Range(minimum=1)]
    memory_kernel: Literal["elu", "centred", "ridge", "delta_token"]
    ridge_penalty: Annotated[float, Range(minimum=1e-6)]  # fp32 cannot solve with less
    write: Literal["linear", "delta"] | None
    local: Literal["linear", "softmax", "none"]
    mix: Literal["gate", "joint"]
    detach_every: Annotated[int, Range(minimum=1)] | None

    def check(self, config: Any) -> list[str]:
        """Return what is wrong with the layer's options in this model."""
        problems = not_dividing("layers.memory_heads", self.memory_heads, "model.dim", config.model.dim)
        own_rule = {"centred": "linear", "ridge": "linear", "delta_token": "delta"}.get(self.memory_kernel)
        if own_rule is not None and self.write not in (None, own_rule):
            problems.append(
                f"layers.write={self.write}: is not how layers.memory_kernel={self.memory_kernel} writes. "
                f"Allowed with it: {own_rule}, null. Set layers.write=null or layers.memory_kernel=elu."
            )
        if self.mix == "joint" and self.local == "softmax":
            problems.append(
                "layers.mix=joint: needs sums that memory and local attention share, layers.local=softmax has none. "
                "Allowed with joint: local=linear, local=none. Set layers.local=linear or layers.mix=gate."
            )
        if self.mix == "joint" and self.memory_kernel != "elu":
            problems.append(
                f"layers.mix=joint: needs a memory read with a normaliser, layers.memory_kernel={self.memory_kernel} has none. "
                "Allowed with joint: memory_kernel=elu. Set layers.memory_kernel=elu or layers.mix=gate."
            )
        return problems


class Recall(NamedTuple):
    """What the memories say to queries; R: rows, a segment each.

    Attributes:
        sums: [R, H, m, d]; with mix=joint they have a denominator.
        decisions: what the layer decided per position on the way [R, ..., m]; None if nothing.
    """

    sums: Sums
    decisions: Tensor | None


class Attended(NamedTuple):
    """Attention of segments that stood side by side, each a row.

    Attributes:
        values: memory and local attention together [R, H, m, d].
        recalled: the memory's part [R, H, m, d].
        gates: weight of the memory, 0 to 1 [R, H or 1, m, 1].
        decisions: as in `Recall`.
        num_segments: how many of each text.
    """

    values: Tensor
    recalled: Sums
    gates: Tensor
    decisions: Tensor | None
    num_segments: int


class MemoryLayer(Layer):
    """y = x + Attention(LN1 x) + MLP(LN2 x); projections without bias, no position encoding on memory or local linear path.

    Segments are decided by token positions, never by the call: the open segment's keys and values are part of the state. A subclass
    says what its memories answer together, in `recall`.

    Args:
        dim: hidden size.
        mlp_dim: width of the MLP.
        config: memory options.
        num_banks: memories that are written in turn.
        segments_per_bank: segments written to one before the next one's turn.

    Attributes:
        recalls_as_bank: with one bank, `recall` is what that bank answers.
    """

    recalls_as_bank: ClassVar[bool] = False

    def __init__(self, dim: int, mlp_dim: int, config: MemoryConfig, *, num_banks: int, segments_per_bank: int) -> None:
        super().__init__()
        self.options, self.num_banks, self.segments_per_bank = config, num_banks, segments_per_bank
        self.kernel = make_kernel(config.memory_kernel, config.write, config.ridge_penalty)
        self.num_heads, self.head_dim = config.memory_heads, dim // config.memory_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.query_key_value = Linear(dim, 3 * dim, bias=False)
        self.output = Linear(dim, dim, bias=False)
        self.mlp = MLP(dim, mlp_dim)
        if self.kernel.has_strengths:
            self.strength = Linear(dim, self.num_heads, bias=False)
        if config.mix == "gate" and config.local != "none":
            self.memory_gate = nn.Parameter(torch.zeros(self.num_heads))

    @abstractmethod
    def recall(self, banks: Snapshots) -> Recall:
        """Return what the memories say to the segments' queries, each segment a row; zeros while all are empty."""

    def recall_flops(self, lengths: Sequence[int]) -> float:
        """Return the matrix FLOPs on one head of `recall` over a text of segments of these lengths."""
        return self.kernel.recall_flops(lengths, self.num_banks, self.head_dim)

    def facts(self, decisions: Tensor) -> dict[str, Tensor]:
        """Return what is worth knowing of the decisions of `recall`, per position, by name."""
        return {}

    @property
    def reads_side_by_side(self) -> bool:
        """Whether whole segments are read together; False where reading them apart leaves more of it out."""
        return True

    @property
    def takes_fused(self) -> bool:
        """Whether a device's kernel for the token delta rule could pass over this layer's segments."""
        return isinstance(self.kernel, DeltaToken) and self.recalls_as_bank and self.num_banks == 1

    def use_fused(self, rule: fused_delta.Rule, device: torch.device | str) -> str | None:
        """Train with such a kernel if it does what the layer's own does; else return what is wrong with it."""
        assert isinstance(self.kernel, DeltaToken), "only layers with `takes_fused` are given one"
        problem = fused_delta.problem_with(
            rule, self.kernel.as_one_segment, num_heads=self.num_heads, head_dim=self.head_dim, device=device
        )
        self.kernel.fused = rule if problem is None else None
        return problem

    def initial_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> MemoryLayerState:
        zeros, sizes = (0,) * batch_size, (self.num_heads, self.head_dim)
        memory = self.kernel.empty(batch_size, self.num_banks, *sizes, device=device, dtype=dtype)
        empty = torch.zeros(batch_size, self.num_heads, 0, self.head_dim, device=device, dtype=dtype)
        strengths = empty[..., : int(self.kernel.has_strengths)]
        return MemoryLayerState(memory, empty, empty, strengths, zeros, zeros, zeros, (False,) * self.num_banks)

    def forward(
        self, hidden: Tensor, state: MemoryLayerState, *, update_memory: bool = True
    ) -> tuple[Tensor, MemoryLayerState]:
        def attend(normed: Tensor, rows_state: MemoryLayerState) -> tuple[Tensor, MemoryLayerState]:
            parts, next_state = self._attend(normed, rows_state, update_memory)
            values = joined([as_tokens(part.values, part.num_segments) for part in parts], dim=1)
            return self.output(values.flatten(2).to(normed.dtype)), next_state

        attended, next_state = by_groups(attend, self.attention_norm(hidden), state, state.places)
        return hidden + attended + self.mlp(self.mlp_norm(hidden)), next_state

    @torch.no_grad()
    def telemetry(self, hidden: Tensor, state: MemoryLayerState) -> dict[str, float]:
        """Return how a call with these inputs uses the memory; computes it anew, nothing of a call is kept.

        Args:
            hidden: input [B, T, D].
            state: the state before it.
        Returns:
            Means over the tokens: `gate_mean`, the memory's weight beside local attention where it holds something, 0 to 1, and 0
            where it holds nothing at all; `read_norm`, the length of what the memory answers; and what the kind of layer decides per
            position, by its name.
        """
        normed, rows = self.attention_norm(hidden), []
        for row in range(hidden.shape[0]):
            parts, _ = self._attend(normed[row : row + 1], state.select([row]), update_memory=True)
            facts = [self._facts(part) for part in parts]
            rows.append({name: torch.cat([fact[name].float().flatten() for fact in facts]) for name in facts[0]})
        values = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        values["gate_mean"] = _where_it_speaks(values["gate_mean"])
        return {name: float(found.mean()) for name, found in values.items()}

    def close_segment(self, state: MemoryLayerState) -> MemoryLayerState:
        """Return the state with the open segment written although it is short: where a text ends."""

        def close(nothing: Tensor, rows_state: MemoryLayerState) -> tuple[Tensor, MemoryLayerState]:
            tokens = rows_state.open_tokens()
            if tokens.keys.shape[2] == 0:
                return nothing, rows_state
            dtype = torch.promote_types(tokens.keys.dtype, torch.float32)
            written = Tokens(*(tensor.to(dtype) for tensor in tokens))
            banks = self._banks(rows_state, dtype)
            banks.pass_over(one_segment(written.keys[:, :, :0], written), writes=True)
            return nothing, _state_after(rows_state, banks, tokens.last(0))

        return by_groups(close, state.keys[:, 0, :0], state, state.places)[1]

    def flops_per_token(self, length: int) -> float:
        closed, rest = divmod(length, self.options.segment_length)
        segments = [self.options.segment_length] * closed + [rest] * (rest > 0)
        local = 0 if self.options.local == "none" else sum(4 * self.head_dim * tokens**2 for tokens in segments)
        inside = sum(self.kernel.segment_flops(tokens, self.head_dim) for tokens in segments)
        writes = closed * self.options.segment_length * self.kernel.write_flops(self.head_dim)
        attention = self.num_heads * (local + inside + writes + self.recall_flops(segments))
        strength = 2 * self.strength.weight.numel() if self.kernel.has_strengths else 0
        projections = 2 * (self.query_key_value.weight.numel() + self.output.weight.numel())
        return projections + strength + attention / length + self.mlp.flops_per_token()

    def state_bytes(self, length: int) -> int:
        open_tokens = length % self.options.segment_length
        memory = self.kernel.memory_bytes(self.num_banks, self.num_heads, self.head_dim)
        return memory + 4 * open_tokens * self.num_heads * (2 * self.head_dim + self.kernel.has_strengths)

    def _attend(
        self, normed: Tensor, state: MemoryLayerState, update_memory: bool
    ) -> tuple[list[Attended], MemoryLayerState]:
        """Attention by segments, and the next state, for rows whose segments and banks stand at the same place."""
        projected = self.query_key_value(normed).unflatten(-1, (3, self.num_heads, -1))
        # At least fp32: sums over a long text lose their last terms below that.
        dtype = torch.promote_types(projected.dtype, torch.float32)
        strengths = projected[..., 0, :, :0]
        if self.kernel.has_strengths:
            strengths = torch.sigmoid(self.strength(normed).to(dtype)).unsqueeze(-1)
        # Autocast would round the sums again.
        with torch.autocast(normed.device.type, enabled=False):
            return self._attend_segments(projected.to(dtype), strengths.to(dtype), state, update_memory)

    def _attend_segments(
        self, projected: Tensor, strengths: Tensor, state: MemoryLayerState, update_memory: bool
    ) -> tuple[list[Attended], MemoryLayerState]:
        """As `_attend`, from queries, keys and values [B, T, 3, H, d] and strengths [B, T, H, 1]."""
        banks, parts, tokens = self._banks(state, projected.dtype), [], state.open_tokens()
        closed, length, every = 0, self.options.segment_length, self.options.detach_every
        fuses = update_memory and every is None and self.takes_fused and banks.can_fuse()
        at_once = banks.segments_at_once() if self.reads_side_by_side else 1
        for segments in cut(projected, strengths, tokens, length, at_once=at_once):
            count, is_whole = len(segments.queries), segments.keys.shape[3] == length
            if fuses and segments.queries.shape[3] == length:
                answers = banks.pass_over_fused(segments)
                recall = Recall(Sums(answers, None), None)
                has_content = answers.new_ones(len(answers), 1, dtype=torch.bool)
            else:
                detach_after = [i for i in range(count * is_whole) if every and (closed + i + 1) % every == 0]
                seen = banks.pass_over(segments, writes=update_memory and is_whole, detach_after=detach_after)
                recall, has_content = self.recall(seen), seen.has_content().any(1, keepdim=True)
            values, gates = self._mix(recall.sums, segments, has_content[:, :, None, None])
            parts.append(Attended(values, recall.sums, gates, recall.decisions, count))
            closed += count * is_whole
        still_open = segments.first().last(0 if is_whole else segments.keys.shape[3])
        return parts, _state_after(state, banks, still_open)

    def _facts(self, part: Attended) -> dict[str, Tensor]:
        """What `telemetry` tells, by position."""
        norms = part.recalled.answers().square().sum(dim=(1, 3)).sqrt()
        decided = {} if part.decisions is None else self.facts(part.decisions)
        return {"gate_mean": part.gates, "read_norm": norms, **decided}

    def _banks(self, state: MemoryLayerState, dtype: torch.dtype) -> Banks:
        return Banks(
            self.kernel,
            state.memory.to(dtype),
            current=state.current_bank[0],
            segments_written=state.segments_in_bank[0],
            segments_per_bank=self.segments_per_bank,
            frozen=state.frozen,
            with_sums=self.options.mix == "joint",
        )

    def _mix(self, recalled: Sums, segments: Segments, has_content: Tensor) -> tuple[Tensor, Tensor]:
        """Memory of earlier segments and attention inside these, joined, and the memory's weight; `has_content` [R, 1, 1, 1]."""
        whole = (-1, -1, segments.queries.shape[3], -1)
        if self.options.local == "none":
            return recalled.answers(), has_content.to(segments.queries.dtype).expand(whole)
        local = (
            Sums(softmax_attention(segments), None) if self.options.local == "softmax" else linear_attention(segments)
        )
        if self.options.mix == "joint":
            return recalled.joined(local)
        gates = torch.sigmoid(self.memory_gate).view(-1, 1, 1).to(segments.queries.dtype) * has_content
        values = local.numerator * local.shares(1 - gates) + recalled.numerator * recalled.shares(gates)
        return values, gates.expand(whole)


def _where_it_speaks(gates: Tensor) -> Tensor:
    """The weights that are not 0 for want of a memory; a single 0 where all are."""
    spoken = gates[gates > 0]
    return spoken if spoken.numel() else gates.new_zeros(1)


def _state_after(state: MemoryLayerState, banks: Banks, open_tokens: Tokens) -> MemoryLayerState:
    """The state of rows that stood at one place, after a call that leaves these tokens open."""
    rows = state.num_rows
    counters = (open_tokens.keys.shape[2],) * rows, (banks.current,) * rows, (banks.segments_written,) * rows
    # Copies: a view would keep the keys of the whole call alive as long as the state.
    keys, values, strengths = (tensor.clone() for tensor in open_tokens)
    return MemoryLayerState(banks.memory, keys, values, strengths, *counters, state.frozen)
