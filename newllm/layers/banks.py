"""The banks of a memory layer during one call: which is written next, what all of them answer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from newllm.layers.kernels import Elu, Kernel, Segment
from newllm.layers.memory import Bank, LinearMemory, total
from newllm.layers.segments import Segments


class Banks:
    """Reads and writes the memory of rows that stand at the same place of their texts; lives no longer than a call.

    Usage: `open` a segment, read, `close` it if it is complete. Sums that are replaced are new tensors: the memory that the call
    was given stays as it was.

    Args:
        kernel: how banks store and answer.
        memory: what was written so far.
        current: bank whose turn it is.
        segments_written: segments written to it since its turn began.
        segments_per_bank: segments after which the next bank has its turn.
        frozen: banks that are read and never written.
        with_sums: read numerators and denominators side by side instead of values.
    """

    def __init__(
        self,
        kernel: Kernel,
        memory: LinearMemory,
        *,
        current: int,
        segments_written: int,
        segments_per_bank: int,
        frozen: tuple[bool, ...],
        with_sums: bool = False,
    ) -> None:
        self.kernel = kernel
        self.current, self.segments_written = current, segments_written
        self._memory, self._frozen, self._segments_per_bank = memory, frozen, segments_per_bank
        self._banks = memory.banks()
        self._prepared: list[Any] = [None] * len(self._banks)
        self._is_empty_BN = memory.is_empty()
        self._is_filled = [False] * len(self._banks)  # by this call, in all rows
        self._with_sums = with_sums
        self._read = kernel.sums if with_sums and isinstance(kernel, Elu) else kernel.read
        self._segment: Segment | None = None
        self._novelty: Tensor | None = None
        self._open_answer: Tensor | None = None

    def __len__(self) -> int:
        return len(self._banks)

    @property
    def memory(self) -> LinearMemory:
        """The memory as it is now."""
        return self._memory.with_banks(self._banks)

    @property
    def segment(self) -> Segment:
        """The open segment."""
        assert self._segment is not None, "no segment is open"
        return self._segment

    def open(self, segment: Segment) -> None:
        """Begin a segment: its queries are what the next reads answer."""
        self._segment, self._novelty, self._open_answer = segment, None, None

    def close(self) -> None:
        """Write the open segment to the bank whose turn it is, and pass the turn; nothing happens if all banks are frozen."""
        target = self._next_open()
        if target is None:
            return
        self._replace(target, self.kernel.write(self._banks[target], self.segment, self._novelty_for(target)))
        self._pass_turn(target)

    def can_pass_over(self) -> bool:
        """Return whether `pass_over` is what opening, reading and closing whole segments would come to."""
        return self.kernel.fused is not None and not self._frozen[0] and torch.is_grad_enabled()

    def pass_over(self, segments: Segments) -> Tensor:
        """Open, read and close whole segments; return what the only bank answered on the way [B, H, n * L, d]."""
        answers, written = self.kernel.pass_over(self._banks[0], segments)
        self._replace(0, written)
        return answers

    def detach(self) -> None:
        """Cut the gradient through everything written so far."""
        self._banks = [type(bank)(*(tensor.detach() for tensor in bank)) for bank in self._banks]
        self._prepared = [None] * len(self)

    def has_content(self) -> Tensor:
        """Return True for banks that have something to say to the open segment's queries."""
        if not self.kernel.reads_open_segment:
            return ~self._is_empty_BN
        return ~self._is_empty_BN | self._is(self._reading_target())

    def read_each(self, segment: Segment | None = None) -> Tensor:
        """Return what every bank answers [B, N, H, m, d], to the open segment's queries or to those of a part of it."""
        segment = self.segment if segment is None else segment
        answers = self._read(self._prepare(), segment)
        if not self.kernel.reads_open_segment:
            return answers
        own = self._read_open(segment).unsqueeze(1)
        if len(self) == 1:
            return answers + own
        return answers + self._is(self._reading_target()).to(own.dtype).view(-1, 1, 1, 1) * own

    def read_total(self) -> Tensor:
        """Return what one bank would answer that holds the sums of all of them [B, H, m, d]."""
        prepared = self.kernel.prepare(total(self._banks), self.segment.queries.shape[2])
        answer = self._read(tuple(tensor.unsqueeze(1) for tensor in prepared), self.segment).squeeze(1)
        return answer + self._read_open(self.segment) if self.kernel.reads_open_segment else answer

    def weigh(self, answers: Tensor, weights: Tensor) -> Tensor:
        """Return the answers [B, N, H, m, d] of the banks as one, by shares [B, N, H or 1, m or 1] of those with content.

        Equal shares of sums make them the sums of one bank: the number of banks alone then changes nothing.
        """
        if self._with_sums:
            weights = weights * self.has_content().sum(1).view(-1, 1, 1, 1)
        return (weights.unsqueeze(-1) * answers).sum(1)

    def cosines(self) -> Tensor:
        """Return how much the sum of each bank's key features points the way of each of the open segment's queries [B, N, H, m]."""
        queries = self.segment.queries
        norms = torch.stack([bank.norm for bank in self._banks], dim=-1)  # [B, H, d, N]
        cosines = (queries @ normalize(norms, dim=-2)).permute(0, 3, 1, 2) / queries.norm(dim=-1).unsqueeze(1)
        if not self.kernel.reads_open_segment:
            return cosines
        target = self._reading_target()
        own = self.segment.keys.cumsum(dim=2)[:, :, self.segment.keys.shape[2] - queries.shape[2] :]
        open_cosines = torch.cosine_similarity(queries, norms[..., target].unsqueeze(-2) + own, dim=-1)
        return torch.where(self._is(target).view(-1, 1, 1), open_cosines.unsqueeze(1), cosines)

    def _next_open(self) -> int | None:
        """First bank from the current one on, in turn, that is not frozen; None if all are."""
        for step in range(len(self)):
            candidate = (self.current + step) % len(self)
            if not self._frozen[candidate]:
                return candidate
        return None

    def _reading_target(self) -> int:
        """The bank that the open segment is read with: the one it will go to, or would if none was frozen."""
        target = self._next_open()
        return self.current if target is None else target

    def _novelty_for(self, target: int) -> Tensor:
        if self._novelty is None:
            self._novelty = self.kernel.novelty(self._banks[target], self.segment)
        return self._novelty

    def _read_open(self, segment: Segment) -> Tensor:
        novelty = self._novelty_for(self._reading_target())
        if segment is not self.segment:
            return self.kernel.read_open(segment, novelty)
        if self._open_answer is None:
            self._open_answer = self.kernel.read_open(segment, novelty)
        return self._open_answer

    def _prepare(self) -> tuple[Tensor, ...]:
        """What reads of all banks need, side by side on axis 1; only for banks written since, it is made anew."""
        num_queries = self.segment.queries.shape[2] if len(self) == 1 else None
        for bank, prepared in enumerate(self._prepared):
            if prepared is None:
                self._prepared[bank] = self.kernel.prepare(self._banks[bank], num_queries)
        if len(self) == 1:
            return tuple(tensor.unsqueeze(1) for tensor in self._prepared[0])
        return tuple(torch.stack(tensors, dim=1) for tensors in zip(*self._prepared, strict=True))

    def _replace(self, target: int, written: Bank) -> None:
        self._banks[target], self._prepared[target] = written, None
        if not self._is_filled[target]:
            self._is_filled[target] = True
            self._is_empty_BN = self._is_empty_BN & ~self._is(target)

    def _is(self, bank: int) -> Tensor:
        """True for that bank [N]."""
        return torch.arange(len(self), device=self._is_empty_BN.device) == bank

    def _pass_turn(self, target: int) -> None:
        if len(self) == 1:
            return
        written = 1 if target != self.current else self.segments_written + 1
        is_full = written >= self._segments_per_bank
        self.current, self.segments_written = ((target + 1) % len(self), 0) if is_full else (target, written)


def shares(logits: Tensor, has_content: Tensor) -> Tensor:
    """Return the softmax over axis 1 of those with content; zeros where none has any."""
    masked = logits.masked_fill(~has_content, torch.finfo(logits.dtype).min)
    return torch.softmax(masked, dim=1).masked_fill(~has_content, 0)
