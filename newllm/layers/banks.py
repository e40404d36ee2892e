"""The banks of a memory layer during one call: which is written next, what all of them answer.

Segments are written one after another and read side by side: a reading sees the banks as they were before its own segment.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from newllm.layers.kernels import Elu, Kernel, Segment, Written
from newllm.layers.memory import Bank, LinearMemory, Sums, dots
from newllm.layers.segments import Segments, joined

# Bytes of the banks' matrices that stand side by side, one set for each segment, by device: what a CPU's caches hold; what
# keeps a GPU busy.
MAX_FOUND_BYTES = {"cpu": 2**24, "cuda": 2**28}

Version = tuple[int, int, int]
"""Place of a bank, how often it had been written or cut from its gradient, and how many segments it is side by side for."""

Found = Mapping[Version, Bank]
"""The banks that a segment finds; of a single bank also what several segments find, side by side [n * B, ...]."""


class Banks:
    """Writes the memory of rows that stand at the same place of their texts; lives no longer than a call.

    Sums that are replaced are new tensors: the memory that the call was given stays as it was.

    Args:
        kernel: how banks store and answer.
        memory: what was written so far.
        current: bank whose turn it is.
        segments_written: segments written to it since its turn began.
        segments_per_bank: segments after which the next bank has its turn.
        frozen: banks that are read and never written.
        with_sums: add up weighted numerators and denominators instead of answers.
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
        self._sums = memory.by_bank()  # [N, B, ...]
        self._is_empty_BN = memory.is_empty()
        self.with_sums = with_sums
        self._versions = [0] * len(frozen)  # how often each was written, or cut from its gradient
        self._known: dict[Version, tuple[Tensor, ...]] = {}

    def __len__(self) -> int:
        return len(self._frozen)

    @property
    def memory(self) -> LinearMemory:
        """The memory as it is now."""
        return self._memory.with_banks(self._sums.one_by_one()) if any(self._versions) else self._memory

    def segments_at_once(self) -> int:
        """Return how many segments to pass over side by side: what they find has room where it is read and written quickly."""
        matrices = self._memory.matrix
        limit = MAX_FOUND_BYTES.get(matrices.device.type, MAX_FOUND_BYTES["cpu"])
        return max(1, limit // (matrices.numel() * matrices.element_size()))

    def pass_over(self, segments: Segments, *, writes: bool, detach_after: Collection[int] = ()) -> Snapshots:
        """Go over segments in turn, and return the banks as each of them found them.

        Args:
            segments: side by side.
            writes: write each to the bank whose turn it is, and pass the turn; without effect if all banks are frozen.
            detach_after: segments, counted from 0, after which the gradient through everything written is cut.
        """
        current = {(place, count, 1) for place, count in enumerate(self._versions)}
        self._known = {version: prepared for version, prepared in self._known.items() if version in current}
        arranged, count = self.kernel.arrange(segments), len(segments.queries)
        writes = writes and not all(self._frozen)
        targets = self._take_turns(count, writes=writes)
        first_written = {target: targets.index(target) for target in targets} if writes else {}
        is_empty = self._is_empty_BN
        if count > 1:
            is_empty = (is_empty & ~self._is_after(first_written, count).unsqueeze(1)).flatten(0, 1)
        if first_written:
            self._is_empty_BN = self._is_empty_BN & ~self._is_one_of(first_written)
        found, novelty = self._write(arranged, targets, detach_after) if writes else self._look(arranged, targets[0])
        own = None if novelty is None else Own(self._is_target(targets), novelty)
        return Snapshots(self, arranged.as_rows(), found, is_empty, own)

    def read_weighted(self, prepared: tuple[Tensor, ...], segment: Segment, weights: Tensor) -> Sums:
        """Return the weighted sum of prepared banks' answers [R, H, m, d], or of their sums."""
        if self.with_sums and isinstance(self.kernel, Elu):
            return self.kernel.sums_weighted(prepared, segment, weights)
        return Sums(self.kernel.read_weighted(prepared, segment, weights), None)

    def prepared(self, version: Version, bank: Bank) -> tuple[Tensor, ...]:
        """Return what reads of one of several banks need: most segments find what the one before found, and it is made once."""
        if version not in self._known:
            self._known[version] = self.kernel.prepare(bank)
        return self._known[version]

    def can_fuse(self) -> bool:
        """Return whether `pass_over_fused` is what passing over whole segments, writing each, would come to."""
        return self.kernel.fused is not None and not self._frozen[0] and torch.is_grad_enabled()

    def pass_over_fused(self, segments: Segments) -> Tensor:
        """Read and write whole segments; return what the only bank answered on the way [n * B, H, L, d]."""
        answers, written = self.kernel.pass_over(self._sums.one_by_one()[0], segments)
        self._sums = Bank(*(tensor.unsqueeze(0) for tensor in written))
        self._versions[0] += 1
        self._is_empty_BN = torch.zeros_like(self._is_empty_BN)
        return answers

    def _look(self, segments: Segment, target: int) -> tuple[list[Found], Tensor | None]:
        """What segments find that are not written, and what each would write to its target if reads see that [n * B, H, L, d]."""
        banks = self._sums.one_by_one()
        novelty = None
        if self.kernel.reads_open_segment:
            novelty = self.kernel.novelty(banks[target], segments).flatten(0, 1)
        return [_versioned(self._versions, banks)] * len(segments.queries), novelty

    def _write(
        self, segments: Segment, targets: Sequence[int], detach_after: Collection[int]
    ) -> tuple[list[Found], Tensor | None]:
        """As `_look`, of segments that are written in turn."""
        ends = sorted({*(index + 1 for index in detach_after), len(targets)})
        parts = segments.split([end - first for first, end in pairwise([0, *ends])])
        found: list[Found] = []
        novelties = []
        for part, end in zip(parts, ends, strict=True):
            own_targets = targets[end - len(part.queries) : end]
            written = self.kernel.write(self._sums, part, own_targets)
            found += self._found(written, own_targets)
            novelties.append(written.novelty)
            self._sums = written.last
            if end - 1 in detach_after:
                self._sums = Bank(*(tensor.detach() for tensor in self._sums))
                self._versions = [version + 1 for version in self._versions]
        return found, joined(novelties, dim=0).flatten(0, 1) if self.kernel.reads_open_segment else None

    def _found(self, written: Written, targets: Sequence[int]) -> list[Found]:
        """All banks as each segment found them; with one bank a single one for all of them, in their rows [n * B, ...]."""
        before = list(self._versions)
        for target in targets:
            self._versions[target] += 1
        if len(self) == 1:
            return [{(0, before[0], len(targets)): Bank(*(tensor.flatten(0, 1) for tensor in written.found))}]
        # From the last segment back: a bank is as the next segment that goes to it finds it, or as it is left.
        versions, banks, found = list(self._versions), written.last.one_by_one(), []
        for target, bank in zip(reversed(targets), reversed(written.found.one_by_one()), strict=True):
            versions[target] -= 1
            banks[target] = bank
            found.append(_versioned(versions, banks))
        return found[::-1]

    def _take_turns(self, count: int, *, writes: bool) -> list[int]:
        """The banks that so many segments go to, or would if none was frozen; passes the turn on if they are written."""
        targets = []
        for _ in range(count):
            target = self._next_open()
            targets.append(self.current if target is None else target)
            if writes:
                self._pass_turn(targets[-1])
        return targets

    def _next_open(self) -> int | None:
        """First bank from the current one on, in turn, that is not frozen; None if all are."""
        for step in range(len(self)):
            candidate = (self.current + step) % len(self)
            if not self._frozen[candidate]:
                return candidate
        return None

    def _is_after(self, first_written: Mapping[int, int], count: int) -> Tensor:
        """True where a bank was written before a segment of the call [n, N]; in whole tensors, which no device waits for."""
        indices = torch.arange(count, device=self._is_empty_BN.device)
        return torch.stack([indices > first_written.get(bank, count) for bank in range(len(self))], dim=1)

    def _is_target(self, targets: Sequence[int]) -> Tensor:
        """True for the target of each row [R, N]."""
        if len(self) == 1:
            return self._is_empty_BN.new_ones(len(targets) * len(self._is_empty_BN), 1)
        return torch.cat([self._is_one_of([target]).expand_as(self._is_empty_BN) for target in targets])

    def _is_one_of(self, banks: Collection[int]) -> Tensor:
        """True for those banks [N]."""
        indices = torch.arange(len(self), device=self._is_empty_BN.device)
        is_one = torch.zeros_like(indices, dtype=torch.bool)
        for bank in banks:
            is_one = is_one | (indices == bank)
        return is_one

    def _pass_turn(self, target: int) -> None:
        if len(self) == 1:
            return
        written = 1 if target != self.current else self.segments_written + 1
        is_full = written >= self._segments_per_bank
        self.current, self.segments_written = ((target + 1) % len(self), 0) if is_full else (target, written)


class Own(NamedTuple):
    """What a segment's reads see of the segment itself.

    Attributes:
        is_target: the bank that the segment will go to, or would if none was frozen [R, N].
        novelty: what writing the segment there associates with its keys [R, H, L, d].
    """

    is_target: Tensor
    novelty: Tensor


class Snapshots:
    """The banks as each of several segments found them, to be read by its queries; every segment is a row.

    R: rows, all texts' first segments, then their second ones. N: banks.

    Args:
        banks: that the segments passed.
        segment: the segments as rows.
        found: banks by segment, of all texts.
        is_empty: banks never written before a segment [R, N].
        own: None if reads do not see their own segment.
    """

    def __init__(
        self,
        banks: Banks,
        segment: Segment,
        found: Sequence[Found],
        is_empty: Tensor,
        own: Own | None,
    ) -> None:
        self.kernel, self.segment = banks.kernel, segment
        self._banks, self._found, self._is_empty, self._own = banks, found, is_empty, own
        self._open_answer: Tensor | None = None
        self._stacks: dict[str, Tensor] = {}

    def has_content(self) -> Tensor:
        """Return True for banks that have something to say to a row's queries [R, N]."""
        return ~self._is_empty if self._own is None else ~self._is_empty | self._own.is_target

    def read_only(self) -> Sums:
        """Return what the only bank answers [R, H, m, d] to the segments' queries."""
        assert len(self._found[0]) == 1, "several banks are read with weights"
        (bank,) = self._found[0].values()
        if len(self._found) > 1:
            bank = Bank(*(self._rows(name).squeeze(2) for name in Bank._fields))
        return self._read(bank)

    def read_total(self) -> Sums:
        """Return what one bank would answer that holds the sums of all of them [R, H, m, d]."""
        return self._read(Bank(*(self._rows(name).sum(2) for name in Bank._fields)))

    def read_shares(self, weights: Tensor, segment: Segment | None = None) -> Sums:
        """Return the answers of the banks as one [R, H, m, d], by shares [R, N, H or 1, m or 1] of those with content.

        Equal shares of sums make them the sums of one bank: the number of banks alone then changes nothing.

        Args:
            weights: the shares.
            segment: part of each segment, whose queries are asked; None for all of them.
        """
        segment = self.segment if segment is None else segment
        if self._banks.with_sums:
            weights = weights * self.has_content().sum(1).view(-1, 1, 1, 1)
        found = self._banks.read_weighted(self._prepared(), segment, weights)
        if self._own is None:
            return found
        own_share = (weights * self._own.is_target[..., None, None]).sum(1).unsqueeze(-1)  # [R, H or 1, m or 1, 1]
        return found._replace(numerator=found.numerator + own_share * self._read_open(segment, self._own))

    def cosines(self) -> Tensor:
        """Return how much the sum of each bank's key features points the way of each query [R, N, H, m]."""
        queries = self.segment.queries
        norms = self._rows("norm")  # [R, H, N, d]
        cosines = dots(queries, normalize(norms, dim=-1)).permute(0, 3, 1, 2) / queries.norm(dim=-1).unsqueeze(1)
        if self._own is None:
            return cosines
        written = (norms * self._own.is_target[:, None, :, None]).sum(-2)
        open_sums = self.segment.keys.cumsum(dim=2)[:, :, self.segment.keys.shape[2] - queries.shape[2] :]
        open_cosines = torch.cosine_similarity(queries, written.unsqueeze(-2) + open_sums, dim=-1)
        return torch.where(self._own.is_target[..., None, None], open_cosines.unsqueeze(1), cosines)

    def _prepared(self) -> tuple[Tensor, ...]:
        """What weighted reads take of all banks [R, H, N, ...]."""
        if self.kernel.reads_as_found:
            return tuple(self._rows(name) for name in self.kernel.reads_as_found)
        prepared = [[self._banks.prepared(*item) for item in banks.items()] for banks in self._found]
        return tuple(
            _as_rows([[tensors[i] for tensors in banks] for banks in prepared]) for i in range(len(prepared[0][0]))
        )

    def _rows(self, name: str) -> Tensor:
        """A sum of all banks as the segments found it [R, H, N, ...]; of tokens, which have no heads, [R, 1, N]."""
        if name not in self._stacks:
            self._stacks[name] = _as_rows([[getattr(bank, name) for bank in banks.values()] for banks in self._found])
        return self._stacks[name]

    def _read(self, bank: Bank) -> Sums:
        found = self.kernel.read(bank, self.segment)
        if self._own is None:
            return found
        return found._replace(numerator=found.numerator + self._read_open(self.segment, self._own))

    def _read_open(self, segment: Segment, own: Own) -> Tensor:
        if segment is not self.segment:
            return self.kernel.read_open(segment, own.novelty)
        if self._open_answer is None:
            self._open_answer = self.kernel.read_open(segment, own.novelty)
        return self._open_answer


def _versioned(counts: Sequence[int], banks: Sequence[Bank]) -> Found:
    return {(place, count, 1): bank for place, (count, bank) in enumerate(zip(counts, banks, strict=True))}


def _as_rows(by_segment: Sequence[Sequence[Tensor]]) -> Tensor:
    """Tensors [B, H, ...] of the banks of each segment as [R, H, N, ...]."""
    if len(by_segment[0]) == 1:
        return joined([tensor for (tensor,) in by_segment], dim=0).unsqueeze(2)
    return joined([torch.stack(list(tensors), dim=2) for tensors in by_segment], dim=0)


def shares(logits: Tensor, has_content: Tensor) -> Tensor:
    """Return the softmax over axis 1 of those with content; zeros where none has any."""
    masked = logits.masked_fill(~has_content, torch.finfo(logits.dtype).min)
    return torch.softmax(masked, dim=1).masked_fill(~has_content, 0)
