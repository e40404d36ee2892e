"""What a memory layer keeps of a text: its memory, the segment that is still open, and whose turn it is to be written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from torch import Tensor

from newllm.layers.memory import LinearMemory
from newllm.layers.segments import Tokens
from newllm.state import State


@dataclass(frozen=True)
class MemoryLayerState(State):
    """Memory and the open segment.

    Attributes:
        memory: what closed segments wrote.
        keys: keys of the open segment [B, H, L, d], right-aligned.
        values: values of the open segment [B, H, L, d].
        strengths: how much of its value each of its tokens writes [B, H, L, 1], of size 0 where the kernel has none.
        open_lengths: tokens in the open segment, per row.
        current_bank: bank that the next segment goes to, per row.
        segments_in_bank: segments written to it since its turn began, per row.
        frozen: banks that are read and never written.
    """

    memory: LinearMemory
    keys: Tensor = field(metadata={"ragged": True})
    values: Tensor = field(metadata={"ragged": True})
    strengths: Tensor = field(metadata={"ragged": True})
    open_lengths: tuple[int, ...]
    current_bank: tuple[int, ...]
    segments_in_bank: tuple[int, ...]
    frozen: tuple[bool, ...] = field(metadata={"shared": True})

    @property
    def places(self) -> list[tuple[int, int, int]]:
        """Where each row stands; rows at equal places are computed together."""
        return list(zip(self.open_lengths, self.current_bank, self.segments_in_bank, strict=True))

    def open_tokens(self) -> Tokens:
        """Return the open segment of rows that stand at the same place."""
        return Tokens(self.keys, self.values, self.strengths).last(self.open_lengths[0])

    def freeze(self, banks: list[int] | None = None, *, is_frozen: bool = True) -> MemoryLayerState:
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

    def _reset(self, rows: list[bool], keep_frozen: bool) -> MemoryLayerState:
        fresh = super()._reset(rows, keep_frozen)
        if not keep_frozen:
            return dataclasses.replace(fresh, frozen=(False,) * len(self.frozen)) if all(rows) else fresh
        if not any(self.frozen):
            return fresh
        return dataclasses.replace(fresh, memory=self.memory.where(self.frozen, fresh.memory))
