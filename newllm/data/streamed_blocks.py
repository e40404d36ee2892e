"""Blocks cut out of a stream of documents, buffer after buffer; the place in it is a few numbers, and exact.

    documents    read until they hold buffer_characters; tokenised together; cut into blocks; the blocks mixed
    position     where the buffer began in the corpus, and batches of it done: a resumed reader fills the same buffer again

Each loader process of each rank is a reader with pieces of the corpus of its own; where there are fewer pieces than readers,
each reads all of them and keeps every n-th document. A reader that comes to the end begins anew. The tokens behind the last
whole block of a buffer are left out, and counted.
"""

import atexit
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import fsspec.asyn
import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from newllm.data.blocks import Blocks, count_blocks, count_used_tokens
from newllm.data.document import Document
from newllm.data.document_stream import DocumentStream, read_records
from newllm.data.loader import end_loader_processes, leave_signals_to_parent
from newllm.data.prepared import Batch
from newllm.data.streams import encode_documents
from newllm.data.tokenizer import Tokenizer

# Of Lightning's: it fetches one batch ahead from a loader without a length, and the position saved would be one too far.
ENDLESS = 1 << 48
SKIPPED = "skipped: "  # begins the names of counts of what is skipped


@dataclass(frozen=True)
class TextStream:
    """Text to train on, as it is streamed.

    Attributes:
        documents: the corpus.
        tokenizer: of its texts.
        is_training: whether a document may be trained on.
        block_length: T.
        buffer_characters: of text whose blocks are mixed.
    """

    documents: DocumentStream
    tokenizer: Tokenizer
    is_training: Callable[[Document], bool]
    block_length: int
    buffer_characters: int


@dataclass(frozen=True)
class Share:
    """Which of the readers of a stream one is, and how it reads.

    Attributes:
        reader: its number.
        num_readers: of all ranks together.
        batch_size: blocks of its batches.
        seed: of the order; unused without shuffle.
        shuffle: mix the blocks of a buffer.
    """

    reader: int
    num_readers: int
    batch_size: int
    seed: int
    shuffle: bool


class BlockReader(Iterator[Batch]):
    """The batches of one reader, without an end.

    Args:
        text: what is read.
        share: the reader's part of it.
    Raises:
        ValueError: its part of the corpus holds no block, or a document cannot be read.
    """

    def __init__(self, text: TextStream, share: Share) -> None:
        self.text, self.share = text, share
        records = text.documents.records
        self.has_own_pieces = records.num_shards >= share.num_readers
        if self.has_own_pieces:
            records = records.shard(share.num_readers, share.reader, contiguous=False)
        self.records = deepcopy(records)
        self.beginning = self.records.state_dict()
        # Where the buffer began: all that is needed to fill it again.
        self.start: dict[str, Any] = {
            "records": self.beginning,
            **dict.fromkeys(("records_read", "passes", "blocks_of_pass", "buffers", "blocks"), 0),
            "counts": {},
        }
        self.batches_done = 0
        self.batches: list[np.ndarray] | None = None  # of the buffer; None before it is filled
        self.counts: Counter[str] = Counter()
        self._rows: Iterator[dict[str, Any]] | None = None  # goes on behind the buffer

    def state_dict(self) -> dict[str, Any]:
        """Return the position behind the last batch, and what has been read and left out so far."""
        return {**deepcopy(self.start), "batches_done": self.batches_done, "read": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the batch at which the state was taken."""
        self.start = {name: deepcopy(state[name]) for name in self.start}
        self.batches_done, self.counts = state["batches_done"], Counter(state["read"])
        self.batches, self._rows = None, None

    def __next__(self) -> Batch:
        if self.batches is None:
            self.batches = self._fill()
        while self.batches_done >= len(self.batches):
            self._go_on()
            self.batches, self.batches_done = self._fill(), 0
        picked = self.batches[self.batches_done]
        self.batches_done += 1
        batch = self.blocks.__getitems__(picked.tolist())
        batch["sample_id"] = (batch["sample_id"] + self.start["blocks"]) * self.share.num_readers + self.share.reader
        return batch

    def _fill(self) -> list[np.ndarray]:
        """Read one buffer, from where `start` says, and return its batches as numbers of blocks."""
        if self._rows is None:
            self.records.load_state_dict(deepcopy(self.start["records"]))
            self._rows = read_records(self.records)
        self.counts, self.records_read = Counter(self.start["counts"]), self.start["records_read"]
        tokenizer, length = self.text.tokenizer, self.text.block_length
        documents = self._read_documents(self._rows)
        pieces = [np.append(ids, tokenizer.eos_id) for _, ids in encode_documents(documents, tokenizer)]
        tokens = np.concatenate(pieces).astype(np.uint32) if pieces else np.empty(0, dtype=np.uint32)
        num_blocks = count_blocks(len(tokens), length)
        num_used = count_used_tokens(num_blocks, length)
        self.counts.update({"documents": len(documents), "tokens": num_used, "tokens left out": len(tokens) - num_used})
        self.blocks = Blocks(tokens, block_length=length, num_blocks=num_blocks, eos_id=tokenizer.eos_id)
        order = np.arange(num_blocks)
        if self.share.shuffle:
            order = np.random.default_rng((self.share.seed, self.share.reader, self.start["buffers"])).permutation(
                order
            )
        size = self.share.batch_size
        return [order[first : first + size] for first in range(0, num_blocks, size)]

    def _read_documents(self, rows: Iterator[dict[str, Any]]) -> list[Document]:
        documents: list[Document] = []
        num_characters = 0
        self.is_at_end = False
        while num_characters < self.text.buffer_characters:
            row = next(rows, None)
            if row is None:
                self.is_at_end = True
                return documents
            self.records_read += 1
            if not self.has_own_pieces and self.records_read % self.share.num_readers != self.share.reader:
                continue
            skipped: Counter[str] = Counter()
            document = self.text.documents.document_of(row, skipped)
            self.counts.update({SKIPPED + reason: count for reason, count in skipped.items()})
            if document is None:
                continue
            if not self.text.is_training(document):
                self.counts[SKIPPED + "held out"] += 1
                continue
            documents.append(document)
            num_characters += len(document.text)
        return documents

    def _go_on(self) -> None:
        """Let the next buffer begin where this one ended; behind the end of the corpus, at its beginning."""
        start, num_blocks = self.start, len(self.blocks)
        of_pass = start["blocks_of_pass"] + num_blocks
        if self.is_at_end and of_pass == 0:
            raise ValueError(
                f"{self.text.documents.name}: reader {self.share.reader + 1} of {self.share.num_readers} finds no block of "
                f"training text in its part. Allowed: at least {self.text.block_length + 1} tokens for each reader. Lower "
                "data.num_workers or data.block_length, or give more text."
            )
        end = {"records": self.beginning, "records_read": 0, "passes": start["passes"] + 1, "blocks_of_pass": 0}
        on = {"records": self.records.state_dict(), "records_read": self.records_read, "blocks_of_pass": of_pass}
        self.start = {
            **start,
            **(end if self.is_at_end else on),
            "buffers": start["buffers"] + 1,
            "blocks": start["blocks"] + num_blocks,
            "counts": dict(self.counts),
        }
        if self.is_at_end:
            self._rows = None


class StreamedBlocks(IterableDataset):
    """The batches of one rank; each loader process reads a part of them.

    Args:
        text: what is read.
        batch_size: blocks of a batch of this rank.
        seed: of the order; unused without shuffle.
        shuffle: mix the blocks of a buffer.
        rank: which of the ranks reads.
        world_size: ranks that share the corpus.
    """

    def __init__(
        self, text: TextStream, batch_size: int, *, seed: int, shuffle: bool, rank: int = 0, world_size: int = 1
    ) -> None:
        self.text, self.batch_size, self.seed, self.shuffle = text, batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> BlockReader:
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        share = Share(
            reader=self.rank * count + number,
            num_readers=self.world_size * count,
            batch_size=self.batch_size,
            seed=self.seed,
            shuffle=self.shuffle,
        )
        return BlockReader(self.text, share)


class StreamLoader(StatefulDataLoader):
    """A StatefulDataLoader over StreamedBlocks; its state holds the position of every reader.

    Attributes:
        read: what the readers had read and skipped when the state was last taken, as `read_so_far` tells it.
    """

    def __init__(self, blocks: StreamedBlocks, **settings: Any) -> None:
        super().__init__(blocks, **settings)
        self.read: dict[str, Any] = {}

    def __len__(self) -> int:
        return ENDLESS

    def state_dict(self) -> dict[str, Any]:
        """Return the position behind the last batch that was handed out."""
        state = super().state_dict()
        self.read.update(read_so_far(state))
        return {"readers": self._num_readers, "loader": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue behind the batch at which the state was taken.

        Raises:
            ValueError: the corpus was shared by another number of readers.
        """
        if state_dict["readers"] != self._num_readers:
            raise ValueError(
                f"resume: the corpus was shared by {state_dict['readers']} readers (loader processes of all ranks), this run "
                f"has {self._num_readers}. Allowed when streaming: the same. Resume with the same data.num_workers and devices."
            )
        super().load_state_dict(state_dict["loader"])

    @property
    def _num_readers(self) -> int:
        return self.dataset.world_size * max(1, self.num_workers)


def read_so_far(state: dict[str, Any]) -> dict[str, Any]:
    """Return what the readers of a loader have read and skipped: sums over readers and passes.

    Args:
        state: of the loader.
    """
    found: list[dict[str, Any]] = []
    _collect(state, found)
    total: Counter[str] = Counter()
    for reader in found:
        total.update(reader["read"])
    skipped = {name.removeprefix(SKIPPED): count for name, count in total.items() if name.startswith(SKIPPED)}
    others = {name.replace(" ", "_"): count for name, count in total.items() if not name.startswith(SKIPPED)}
    passes = min((reader["passes"] for reader in found), default=0)
    return {**others, "passes_completed": passes, "skipped": dict(sorted(skipped.items()))}


def _collect(state: Any, found: list[dict[str, Any]]) -> None:
    """Find the states of the readers, wherever torchdata keeps them."""
    if isinstance(state, dict):
        if "blocks_of_pass" in state:
            found.append(state)
            return
        for value in state.values():
            _collect(value, found)


def start_loader_process(worker: int) -> None:
    """Prepare a loader process: deaf to signals; alone with its thread, for a pool of threads does not survive a fork."""
    leave_signals_to_parent(worker)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    fsspec.asyn.reset_lock()  # of connections that the parent has opened


def make_stream_loader(blocks: StreamedBlocks, *, num_workers: int, pin_memory: bool) -> StreamLoader:
    """Return a loader that hands out whole batches, one reader after another."""
    atexit.unregister(end_loader_processes)  # so that it is registered once
    atexit.register(end_loader_processes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata calls it, no user can help it
        return StreamLoader(
            blocks,
            batch_size=None,
            num_workers=num_workers,
            worker_init_fn=start_loader_process,
            pin_memory=pin_memory,
            # Its own generator: the base class draws a seed for each iterator out of torch's global one by default.
            generator=torch.Generator().manual_seed(blocks.seed),
        )
