"""Texts read from beginning to end, several side by side: what procedures need that carry a state from block to block.

    lane 0   a0 a1 a2 a3 e0 e1       a0 is the first block of text a, a1 the one after it
    lane 1   b0 b1 b2 c0 d0          batch 0 is a0 b0, batch 1 is a1 b1, batch 5 is e1 alone

Row r of every batch belongs to lane r, so what is kept of a row is continued by the same row of the next batch. Lanes are about
equally long, the longest first: where lanes end, the last rows are missing.
"""

import dataclasses
import hashlib
import heapq
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from newllm.data.blocks import Blocks, count_used_tokens
from newllm.data.loader import EpochBatches
from newllm.data.prepared import NO_TARGET, Batch, PreparedData

NO_BLOCK = -1  # where a lane has ended


class TextBlocks:
    """The blocks of a stream, each text cut from its own beginning.

    The last token of a text, EOS, is a target and never an input with one; a block that a text does not fill goes on with EOS
    and without targets. Blocks are numbered text by text.

    Args:
        stream: token ids, EOS after each text; the last text may be cut short.
        block_length: inputs, and targets, of one block (T).
        eos_id: the token after each text.

    Attributes:
        blocks_per_text: [number of texts].
        num_targets: of all blocks.
    """

    def __init__(self, stream: np.ndarray, *, block_length: int, eos_id: int) -> None:
        self.stream, self.block_length, self.eos_id = stream, block_length, eos_id
        ends = np.flatnonzero(stream == eos_id) + 1
        if len(stream) > 0 and (len(ends) == 0 or ends[-1] < len(stream)):
            ends = np.append(ends, len(stream))
        starts = np.concatenate([[0], ends]).astype(np.int64)[:-1]
        has_target = ends - starts > 1  # EOS alone, or the first token of a text cut short, predicts nothing
        self._starts, self._ends = starts[has_target], ends[has_target]
        self.num_targets = int((self._ends - self._starts - 1).sum())
        self.blocks_per_text = -(-(self._ends - self._starts - 1) // block_length)
        self.first_block = np.cumsum(self.blocks_per_text) - self.blocks_per_text

    def __len__(self) -> int:
        return int(self.blocks_per_text.sum())

    def __getitems__(self, sample_ids: Sequence[int]) -> Batch:
        """Return the batch of these blocks.

        Returns:
            input_ids, labels [B, T], sample_id [B], int64; starts_text [B, T], True where an input begins a text; is_padding
            [B, T], True behind the last input of a text.
        """
        ids_B = np.asarray(sample_ids, dtype=np.int64)
        texts_B = np.searchsorted(self.first_block, ids_B, side="right") - 1
        block_B = ids_B - self.first_block[texts_B]
        positions = (self._starts[texts_B] + block_B * self.block_length)[:, None] + np.arange(self.block_length + 1)
        is_text = positions < self._ends[texts_B][:, None]  # [B, T + 1]
        tokens = self.stream[np.minimum(positions, len(self.stream) - 1)].astype(np.int64)
        starts_text = np.zeros((len(ids_B), self.block_length), dtype=bool)
        starts_text[:, 0] = block_B == 0
        return {
            "input_ids": torch.from_numpy(np.where(is_text, tokens, self.eos_id)[:, :-1].copy()),
            "labels": torch.from_numpy(np.where(is_text, tokens, NO_TARGET)[:, 1:].copy()),
            "sample_id": torch.from_numpy(ids_B.copy()),
            "starts_text": torch.from_numpy(starts_text),
            "is_padding": torch.from_numpy(~is_text[:, 1:]),  # EOS that ends a text is no input with a target
        }

    def first_tokens(self) -> np.ndarray:
        """Return the token that begins each text: no block predicts it."""
        return self.stream[self._starts]


def plan_lanes(
    blocks_per_text: np.ndarray, num_lanes: int, generator: np.random.Generator | None = None
) -> list[list[int]]:
    """Return the texts of each lane, in order; no lane is empty, the longest comes first.

    The next longest text goes to the lane that is shortest so far.

    Args:
        blocks_per_text: how long each text is.
        num_lanes: at most.
        generator: decides between texts of equal length, and the order within lanes; None keeps the texts' order.
    """
    count = len(blocks_per_text)
    texts = np.arange(count) if generator is None else generator.permutation(count)
    longest_first = texts[np.argsort(-blocks_per_text[texts], kind="stable")]
    lanes: list[list[int]] = [[] for _ in range(min(num_lanes, count))]
    loads = [(0, lane) for lane in range(len(lanes))]
    for text in longest_first.tolist():
        load, lane = heapq.heappop(loads)
        lanes[lane].append(text)
        heapq.heappush(loads, (load + int(blocks_per_text[text]), lane))
    order = [lane for _, lane in sorted(loads, key=lambda entry: (-entry[0], entry[1]))]
    if generator is None:
        return [sorted(lanes[lane]) for lane in order]
    return [generator.permutation(lanes[lane]).tolist() for lane in order]


def lane_groups(num_lanes: int) -> list[range]:
    """Return which lanes lie beside each other: two and two from the longest on, the last three where the number is odd.

    Only lanes of one group see each other's memories, so that a group can be read by any process without the others.

    Args:
        num_lanes: lanes, at least one; one alone is a group.
    """
    starts = range(0, max(1, num_lanes - 1), 2)
    return [range(start, end) for start, end in zip(starts, [*starts[1:], num_lanes], strict=True)]


def lanes_beside(num_lanes: int) -> list[int]:
    """Return for each lane the next of its group, behind the last one the first; a lane alone has itself."""
    return [group[(place + 1) % len(group)] for group in lane_groups(num_lanes) for place in range(len(group))]


class LaneBatches(EpochBatches):
    """Batches of one block per lane, epoch after epoch; each block once in each epoch.

    Several ranks share the lanes that one process would read: lane i is rank i % world_size's. The last batches of an epoch,
    with fewer rows than ranks, are left out. Of held-out lanes a rank takes whole groups, so that each lane has the neighbour
    that it has in one process; a rank for which there is none reads the first again.

    Args:
        samples: the blocks.
        num_lanes: rows of a batch of all ranks together, at most.
        seed: of the order; unused without shuffle.
        shuffle: a new order of the texts in each epoch; blocks of a text always follow each other.
        rank: which of the ranks asks.
        world_size: ranks that share the lanes.
        is_held_out: every block counts, and one rank may read longer than another.
    """

    def __init__(
        self,
        samples: TextBlocks,
        num_lanes: int,
        *,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
        is_held_out: bool = False,
    ) -> None:
        super().__init__(
            len(samples),
            num_lanes,
            seed=seed,
            shuffle=shuffle,
            rank=rank,
            world_size=world_size,
            is_held_out=is_held_out,
        )
        self.samples = samples
        # The lengths of the lanes are the same in every epoch, the longest first.
        lanes = plan_lanes(samples.blocks_per_text, num_lanes)
        if len(lanes) < world_size and not is_held_out:
            raise ValueError(
                f"runtime.devices={world_size}: are more than the {len(lanes)} lanes of texts, of which each device reads some. "
                f"Allowed: at most {len(lanes)}. Use fewer devices, raise data.batch_size or give more texts."
            )
        lengths = [int(samples.blocks_per_text[lane].sum()) for lane in lanes]
        self.longest = lengths[0]
        self.num_batches = lengths[self._own(len(lanes))[0]] if is_held_out else lengths[world_size - 1]

    @property
    def batches_in_epoch(self) -> int:
        return self.longest

    def __len__(self) -> int:
        return self.num_batches

    def order(self, epoch: int) -> np.ndarray:
        """Return the blocks of an epoch [batches, lanes]; NO_BLOCK where a lane has ended."""
        # All ranks draw the same lanes and take theirs.
        generator = np.random.default_rng((self.seed, epoch)) if self.shuffle else None
        sizes, first = self.samples.blocks_per_text, self.samples.first_block
        lanes = plan_lanes(sizes, self.batch_size, generator)
        lanes = [lanes[lane] for lane in self._own(len(lanes))]
        blocks = np.full((self.num_batches, len(lanes)), NO_BLOCK)
        for lane, texts in enumerate(lanes):
            own = np.concatenate([first[text] + np.arange(sizes[text]) for text in texts])[: self.num_batches]
            blocks[: len(own), lane] = own
        return blocks

    def _own(self, num_lanes: int) -> list[int]:
        """The lanes of this rank, the longest first."""
        if not self.is_held_out:
            return list(range(self.rank, num_lanes, self.world_size))
        groups = lane_groups(num_lanes)
        return [lane for group in groups[self.rank :: self.world_size] or groups[:1] for lane in group]

    def pick(self, order: np.ndarray, number: int) -> np.ndarray:
        row = order[number]
        return row[row != NO_BLOCK]


def in_lanes(prepared: PreparedData, *, num_lanes: int) -> PreparedData:
    """Return the same texts cut so that each can be read in a lane.

    Args:
        prepared: blocks of a stream; the part of the stream that they use is what is read.
        num_lanes: of training; told if there are fewer texts.
    Raises:
        ValueError: the samples are no running text.
    """
    parts: dict[str, Any] = {}
    splits: dict[str, Any] = {}
    for split in ("train", "validation", "test"):
        blocks = getattr(prepared, split)
        if not isinstance(blocks, Blocks):
            raise ValueError(
                f"data.kind={prepared.facts['kind']}: gives samples of their own, no texts to read on in. "
                "Allowed with trainer=streaming: sources of text. Choose data=bible, stdlib or jsonl."
            )
        used = blocks.stream[: count_used_tokens(len(blocks), blocks.block_length)]
        parts[split] = samples = TextBlocks(used, block_length=blocks.block_length, eos_id=blocks.eos_id)
        # The stream's blocks predict the first token of all texts but the first.
        unpredicted = int(prepared.token_bytes[samples.first_tokens()[1:]].sum())
        facts = prepared.facts["splits"][split]
        splits[split] = {
            **facts,
            "blocks": len(samples),
            "targets": samples.num_targets,
            "bytes": None if facts["bytes"] is None else facts["bytes"] - unpredicted,
            "texts": len(samples.blocks_per_text),
        }
    num_texts = splits["train"]["texts"]
    if num_texts < num_lanes:
        warnings.warn(
            f"data.batch_size={num_lanes}: there are {num_texts} training texts, so batches have at most that many rows.",
            stacklevel=2,
        )
    return dataclasses.replace(
        prepared,
        **parts,
        fingerprint=hashlib.sha256(f"{prepared.fingerprint}, in lanes".encode()).hexdigest(),
        facts={**prepared.facts, "splits": splits, "in_lanes": True},
    )
