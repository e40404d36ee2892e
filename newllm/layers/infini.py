"""Infini-attention: linear attention inside a segment, a compressive memory of all segments before it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from newllm.config.fields import Range
from newllm.config.schema import LayerConfig
from newllm.layers import memory as memories
from newllm.layers.base import MLP, Layer
from newllm.layers.memory import LinearMemory, Reading, divide, feature_map
from newllm.state import State, by_groups


@dataclass(frozen=True, kw_only=True)
class InfiniConfig(LayerConfig):
    """Compressive memory beside attention inside the segment.

    Attributes:
        segment_length: tokens after which the memory is written.
        memory_heads: heads of the memory; divides the hidden size.
        memory_kernel: how associations are stored and read.
        write: "linear" adds every value; "delta" adds what the memory does not already answer.
        local: attention inside the segment.
        mix: "gate" weighs memory and local by a learned gate per head; "joint" gives both one normaliser.
        num_memory_banks: memories that are written in turn.
        segments_per_bank: segments written to a bank before the next one's turn.
        detach_every: segments after which the gradient through the memory is cut, within a call; null never cuts.
    """

    segment_length: Annotated[int, Range(minimum=1)]
    memory_heads: Annotated[int, Range(minimum=1)]
    memory_kernel: Literal["elu"]
    write: Literal["linear", "delta"]
    local: Literal["linear", "softmax", "none"]
    mix: Literal["gate", "joint"]
    num_memory_banks: Annotated[int, Range(minimum=1)]
    segments_per_bank: Annotated[int, Range(minimum=1)]
    detach_every: Annotated[int, Range(minimum=1)] | None

    def check(self, config: Any) -> list[str]:
        """Return what is wrong with the layer's options in this model."""
        problems = []
        dim = config.model.dim
        if dim % self.memory_heads:
            allowed = ", ".join(str(n) for n in range(1, dim + 1) if dim % n == 0)
            problems.append(
                f"layers.memory_heads={self.memory_heads}: does not divide model.dim={dim}. Allowed: {allowed}. "
                "Set layers.memory_heads to one of these or change model.dim."
            )
        if self.mix == "joint" and self.local == "softmax":
            problems.append(
                "layers.mix=joint: needs sums that memory and local attention share, layers.local=softmax has none. "
                "Allowed with joint: local=linear, local=none. Set layers.local=linear or layers.mix=gate."
            )
        return problems


@dataclass(frozen=True)
class InfiniState(State):
    """Memory and the open segment.

    Attributes:
        memory: what closed segments wrote.
        keys: keys of the open segment [B, H, L, d], right-aligned.
        values: values of the open segment [B, H, L, d].
        open_lengths: tokens in the open segment, per row.
        current_bank: bank that the next segment goes to, per row.
        segments_in_bank: segments written to it since its turn began, per row.
        frozen: banks that are read and never written.
    """

    memory: LinearMemory
    keys: Tensor = field(metadata={"ragged": True})
    values: Tensor = field(metadata={"ragged": True})
    open_lengths: tuple[int, ...]
    current_bank: tuple[int, ...]
    segments_in_bank: tuple[int, ...]
    frozen: tuple[bool, ...] = field(metadata={"shared": True})

    def freeze(self, banks: list[int] | None = None, *, is_frozen: bool = True) -> InfiniState:
        """Return the state with the banks (all, if None) protected from writing, or open to it again.

        Raises:
            ValueError: a bank index out of range.
        """
        chosen = range(len(self.frozen)) if banks is None else banks
        for bank in chosen:
            if not 0 <= bank < len(self.frozen):
                raise ValueError(
                    f"bank {bank}: does not exist. Allowed: 0 to {len(self.frozen) - 1}. Choose one of these."
                )
        flags = tuple(is_frozen if bank in chosen else flag for bank, flag in enumerate(self.frozen))
        return dataclasses.replace(self, frozen=flags)

    def _reset(self, rows: list[bool], keep_frozen: bool) -> InfiniState:
        fresh = super()._reset(rows, keep_frozen)
        if not keep_frozen:
            return dataclasses.replace(fresh, frozen=(False,) * len(self.frozen)) if all(rows) else fresh
        if not any(self.frozen):
            return fresh
        is_kept = torch.tensor(self.frozen, device=self.keys.device)
        matrix = torch.where(is_kept.view(1, -1, 1, 1, 1), self.memory.matrix, fresh.memory.matrix)
        norm = torch.where(is_kept.view(1, -1, 1, 1), self.memory.norm, fresh.memory.norm)
        return dataclasses.replace(fresh, memory=LinearMemory(matrix, norm))


class InfiniLayer(Layer):
    """y = x + InfiniAttention(LN1 x) + MLP(LN2 x); projections without bias, no position encoding on memory or local linear path.

    Segments are decided by token positions, never by the call: the open segment's keys and values are part of the state.

    Args:
        dim: hidden size.
        num_heads: unused; memory and local attention share `config.memory_heads`.
        mlp_dim: width of the MLP.
        config: memory options.
    Source: Infini-attention (Munkhdalai et al., 2024). Differs: one wide head by default, linear local attention by default.
    """

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, config: InfiniConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim = config.memory_heads, dim // config.memory_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        self.mlp = MLP(dim, mlp_dim)
        if config.mix == "gate" and config.local != "none":
            self.memory_gate = nn.Parameter(torch.zeros(self.num_heads))
        if config.num_memory_banks > 1:
            self.bank_gate = nn.Parameter(torch.zeros(config.num_memory_banks))

    def initial_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> InfiniState:
        banks, zeros = self.config.num_memory_banks, (0,) * batch_size
        empty = torch.zeros(batch_size, self.num_heads, 0, self.head_dim, device=device, dtype=dtype)
        memory = memories.empty_memory(batch_size, banks, self.num_heads, self.head_dim, device=device, dtype=dtype)
        return InfiniState(memory, empty, empty, zeros, zeros, zeros, (False,) * banks)

    def forward(self, hidden: Tensor, state: InfiniState, *, update_memory: bool = True) -> tuple[Tensor, InfiniState]:
        counters = list(zip(state.open_lengths, state.current_bank, state.segments_in_bank, strict=True))

        def attend(normed: Tensor, rows_state: InfiniState) -> tuple[Tensor, InfiniState]:
            return self._attend(normed, rows_state, update_memory)

        attended, next_state = by_groups(attend, self.attention_norm(hidden), state, counters)
        return hidden + attended + self.mlp(self.mlp_norm(hidden)), next_state

    def flops_per_token(self, length: int) -> float:
        projections = 2 * 4 * self.query.weight.numel()
        closed, rest = divmod(length, self.config.segment_length)
        mean_segment = (closed * self.config.segment_length**2 + rest**2) / length
        local = 0 if self.config.local == "none" else 4 * mean_segment * self.num_heads * self.head_dim
        per_head = self.head_dim * (self.head_dim + 1)
        reads = 2 * self.config.num_memory_banks * self.num_heads * per_head
        if self.config.num_memory_banks > 1 and self.config.mix == "gate":
            reads += 2 * self.config.num_memory_banks * self.num_heads * self.head_dim
        closed_share = closed * self.config.segment_length / length
        delta = per_head if self.config.write == "delta" else 0
        writes = closed_share * 2 * self.num_heads * (self.head_dim**2 + delta)
        return projections + local + reads + writes + self.mlp.flops_per_token()

    def state_bytes(self, length: int) -> int:
        open_tokens = length % self.config.segment_length
        memory = memories.memory_bytes(self.config.num_memory_banks, self.num_heads, self.head_dim)
        return memory + 2 * open_tokens * self.num_heads * self.head_dim * 4

    def _attend(self, normed: Tensor, state: InfiniState, update_memory: bool) -> tuple[Tensor, InfiniState]:
        """Attention for rows whose segments and banks stand at the same place."""
        # Autocast would round the sums that the fp32 of _heads is there for.
        with torch.autocast(normed.device.type, enabled=False):
            return self._attend_in_full(normed, state, update_memory)

    def _attend_in_full(self, normed: Tensor, state: InfiniState, update_memory: bool) -> tuple[Tensor, InfiniState]:
        queries, keys, values = (self._heads(projection(normed)) for projection in (self.query, self.key, self.value))
        past = state.open_lengths[0]
        if past > 0:
            keys = torch.cat([state.keys[:, :, -past:].to(keys.dtype), keys], dim=2)
            values = torch.cat([state.values[:, :, -past:].to(values.dtype), values], dim=2)
        query_features, key_features = feature_map(queries), feature_map(keys)
        memory, bank, in_bank = state.memory.to(keys.dtype), state.current_bank[0], state.segments_in_bank[0]
        attended, closed = [], 0
        total = keys.shape[2]  # tokens since the open segment began
        for start in range(0, total, self.config.segment_length):
            stop = min(start + self.config.segment_length, total)
            own = slice(max(start, past) - past, stop - past)  # queries of this segment that are in this call
            attended.append(
                self._mix(
                    memories.read(memory, query_features[:, :, own]),
                    memory.is_empty(),
                    (queries[:, :, own], query_features[:, :, own]),
                    (keys[:, :, start:stop], key_features[:, :, start:stop], values[:, :, start:stop]),
                )
            )
            if stop - start < self.config.segment_length:
                break
            closed += 1
            target = _next_open(bank, state.frozen)
            if update_memory and target is not None:
                in_bank = 0 if target != bank else in_bank
                memory = memories.write(
                    memory, target, key_features[:, :, start:stop], values[:, :, start:stop], self.config.write
                )
                bank, in_bank = self._advance(target, in_bank)
                if self.config.detach_every is not None and closed % self.config.detach_every == 0:
                    memory = memory.detach()
        rows, kept = normed.shape[0], total - closed * self.config.segment_length
        next_state = InfiniState(
            memory,
            keys[:, :, total - kept :],
            values[:, :, total - kept :],
            (kept,) * rows,
            (bank,) * rows,
            (in_bank,) * rows,
            state.frozen,
        )
        return self.output(torch.cat(attended, dim=2).transpose(1, 2).flatten(2).to(normed.dtype)), next_state

    def _heads(self, projected: Tensor) -> Tensor:
        """[B, T, H*d] -> [B, H, T, d], at least fp32: sums over a long text lose their last terms below that."""
        split = projected.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        return split.to(torch.promote_types(split.dtype, torch.float32))

    def _mix(
        self,
        reading: Reading,
        is_empty_BN: Tensor,
        queries: tuple[Tensor, Tensor],
        segment: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        """Memory of earlier segments and attention inside this one, joined: [B, H, T, d]."""
        weights_BN = self._bank_weights(is_empty_BN)
        if self.config.local == "none":
            return self._read_values(reading, weights_BN)
        if self.config.local == "softmax":
            local = Reading(self._local_softmax(queries[0], segment[0], segment[2]), torch.ones(()))
        else:
            local = self._local_linear(queries[1], segment[1], segment[2])
        if self.config.mix == "joint":
            # Uniform weights make the banks' sums one sum: the number of banks alone then changes nothing.
            scale = (weights_BN * (~is_empty_BN).sum(1, keepdim=True)).view(*weights_BN.shape, 1, 1, 1)
            numerator = local.numerator + (scale * reading.numerator).sum(1)
            return divide(numerator, local.denominator + (scale * reading.denominator).sum(1))
        local_values = local.numerator / local.denominator
        has_memory = (~is_empty_BN).any(1).view(-1, 1, 1, 1)
        gate = torch.sigmoid(self.memory_gate).view(1, -1, 1, 1) * has_memory
        return gate * self._read_values(reading, weights_BN) + (1 - gate) * local_values

    def _bank_weights(self, is_empty_BN: Tensor) -> Tensor:
        """Shares [B, N] of the banks, over non-empty ones; zeros while all are empty."""
        if self.config.num_memory_banks == 1:
            return (~is_empty_BN).to(torch.float32)
        logits = self.bank_gate.expand(is_empty_BN.shape).masked_fill(
            is_empty_BN, torch.finfo(self.bank_gate.dtype).min
        )
        return torch.softmax(logits, dim=-1).masked_fill(is_empty_BN, 0)

    def _read_values(self, reading: Reading, weights_BN: Tensor) -> Tensor:
        values = reading.values()  # [B, N, H, T, d]
        if values.shape[1] == 1:
            return values[:, 0]
        return torch.einsum("bn,bnhtd->bhtd", weights_BN.to(values.dtype), values)

    @staticmethod
    def _local_linear(query_features: Tensor, key_features: Tensor, values: Tensor) -> Reading:
        """Sums over the segment up to each query: queries are the last ones of the segment's keys."""
        scores = query_features @ key_features.transpose(-1, -2)  # [B, H, T, L]
        scores = scores.tril(diagonal=scores.shape[-1] - scores.shape[-2])
        return Reading(scores @ values, scores.sum(-1, keepdim=True))

    def _local_softmax(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        past = keys.shape[2] - queries.shape[2]
        if past == 0:
            return nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        visible = torch.ones(queries.shape[2], keys.shape[2], dtype=torch.bool, device=keys.device).tril(diagonal=past)
        return nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=visible)

    def _advance(self, bank: int, in_bank: int) -> tuple[int, int]:
        """Bank and count after one more segment went to `bank`."""
        if self.config.num_memory_banks == 1:
            return 0, 0
        if in_bank + 1 < self.config.segments_per_bank:
            return bank, in_bank + 1
        return (bank + 1) % self.config.num_memory_banks, 0


def _next_open(bank: int, frozen: tuple[bool, ...]) -> int | None:
    """First bank from `bank` on, in turn, that is not frozen; None if all are."""
    for step in range(len(frozen)):
        candidate = (bank + step) % len(frozen)
        if not frozen[candidate]:
            return candidate
    return None
