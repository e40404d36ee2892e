"""Which samples come in which batch, and a loader that continues where it stopped.

The order of an epoch is a function of (seed, epoch) alone, so two numbers, epoch and batches done, are the whole
position: they survive any number of resumptions and a changed number of loader processes.
"""

import atexit
import multiprocessing
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from newllm.data.prepared import Batch, Samples


class EpochBatches:
    """Batches of sample ids, epoch after epoch; each sample once in each epoch, the last batch may be smaller.

    Several ranks share the batches that one process would read: of each batch a rank takes the rows `rank, rank + world_size,
    ...`. A last batch with fewer rows than ranks is left out. Held-out batches are shared whole, one rank after another takes
    the next, so that each gives the digits that one process gives; a rank for which there is none reads one again.

    Args:
        num_samples: samples of all ranks together.
        batch_size: samples of a batch of all ranks together.
        seed: of the order; unused without shuffle.
        shuffle: a new order in each epoch.
        rank: which of the ranks asks.
        world_size: ranks that share the batches.
        is_held_out: every sample counts, and there may be more batches for one rank than for another.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
        is_held_out: bool = False,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank, self.world_size = rank, world_size
        self.is_held_out = is_held_out
        self.epoch = 0  # the epoch in which the next iterator begins
        self.batches_done = 0  # batches of that epoch it leaves out

    @property
    def batches_in_epoch(self) -> int:
        """Batches that one process would read: the same for any number of ranks."""
        return -(-self.num_samples // self.batch_size)

    def __len__(self) -> int:
        if self.is_held_out:
            return max(1, len(range(self.rank, self.batches_in_epoch, self.world_size)))
        is_left_out = 0 < self.num_samples % self.batch_size < self.world_size
        return self.batches_in_epoch - is_left_out

    def __iter__(self) -> "EpochIterator":
        return EpochIterator(self)

    def order(self, epoch: int) -> np.ndarray:
        """Return the sample ids of an epoch in their order."""
        samples = np.arange(self.num_samples)
        return np.random.default_rng((self.seed, epoch, 0)).permutation(samples) if self.shuffle else samples

    def pick(self, order: np.ndarray, number: int) -> np.ndarray:
        """Return the sample ids of this rank's part of a batch of an epoch with that order."""
        if self.is_held_out:
            number = (number * self.world_size + self.rank) % self.batches_in_epoch
        batch = order[number * self.batch_size : (number + 1) * self.batch_size]
        return batch if self.is_held_out else batch[self.rank :: self.world_size]


class EpochIterator(Iterator[list[int]]):
    """The rest of one epoch. Its state is read by the loader together with each batch that it hands out.

    It begins when its first batch is asked for, not before: loaders make iterators that they never use.
    """

    def __init__(self, batches: EpochBatches) -> None:
        self.batches = batches
        self.order: np.ndarray | None = None  # not begun

    def __next__(self) -> list[int]:
        order = self._begin() if self.order is None else self.order
        if self.batches_done >= len(self.batches):
            raise StopIteration
        picked = self.batches.pick(order, self.batches_done)
        self.batches_done += 1
        if self.batches_done == len(self.batches):
            # Told now, not when asked once more: Lightning counts batches and never asks after the last.
            self.batches.epoch = self.epoch + 1
        return [int(sample_id) for sample_id in picked]

    def state_dict(self) -> dict[str, int]:
        source = self.batches if self.order is None else self
        return {"epoch": source.epoch, "batches_done": source.batches_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches.epoch, self.batches.batches_done = state["epoch"], state["batches_done"]
        self.order = None

    def _begin(self) -> np.ndarray:
        self.epoch, self.batches_done = self.batches.epoch, self.batches.batches_done
        self.batches.batches_done = 0
        self.order = self.batches.order(self.epoch)
        return self.order


class PositionLoader(StatefulDataLoader):
    """A StatefulDataLoader over EpochBatches whose state is the position alone.

    The state of its base class names the number of loader processes and refuses another.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return epoch, batches done in it, and batches in an epoch."""
        state = super().state_dict()
        main = state["_snapshot"]["_main_snapshot"] if "_snapshot" in state else state
        return {**main["_sampler_iter_state"], "num_batches": self.batch_sampler.batches_in_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the batch at which the state was taken.

        Raises:
            ValueError: the state comes from another number of batches.
        """
        num_batches = self.batch_sampler.batches_in_epoch
        if state_dict["num_batches"] != num_batches:
            raise ValueError(
                f"resume: the data position counts {state_dict['num_batches']} batches in an epoch, this run has "
                f"{num_batches}. Allowed: the same data and batch size. Resume with the run's own configuration."
            )
        is_finished = state_dict["batches_done"] >= len(self.batch_sampler)
        self.batch_sampler.epoch = state_dict["epoch"] + is_finished
        self.batch_sampler.batches_done = 0 if is_finished else state_dict["batches_done"]
        super().load_state_dict({})


def leave_signals_to_parent(worker: int) -> None:
    """Make a loader process deaf to SIGTERM and Ctrl-C, which a cluster and a terminal send to all processes of a run.

    The main process decides when to stop; it may need batches until its optimizer step is complete.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_loader_processes() -> None:
    """Kill the loader processes that are left when the program ends, after an error for example.

    multiprocessing sends them SIGTERM and waits for them, and they are deaf to it.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report each as killed
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _death_in(error: BaseException | None) -> str | None:
    """Return what torch says of a dead loader process, in the error or in one that it followed from."""
    while error is not None and "DataLoader worker" not in str(error):
        error = error.__cause__ or error.__context__
    return None if error is None else str(error).strip()


@contextmanager
def dead_workers_named(num_workers: int) -> Iterator[None]:
    """Say in the block's error what it means when a loader process has died."""
    try:
        yield
    except RuntimeError as error:
        reason = _death_in(error)
        if reason is None:
            raise
        raise RuntimeError(
            f"data.num_workers={num_workers}: a loader process has died ({reason}). Allowed: processes that live. "
            "Most often memory was short: lower data.num_workers or data.batch_size, and resume the run."
        ) from error


def make_loader(samples: Samples, batches: EpochBatches, *, num_workers: int, pin_memory: bool) -> PositionLoader:
    """Return a loader that fetches a whole batch at once."""
    atexit.unregister(end_loader_processes)  # so that it is registered once
    atexit.register(end_loader_processes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata calls it, no user can help it
        return PositionLoader(
            samples,
            batch_sampler=batches,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=leave_signals_to_parent,
            pin_memory=pin_memory,
            collate_fn=_as_fetched,
            # Its own generator: the base class draws a seed for each iterator, out of torch's global one by default,
            # and a resumed run makes one iterator more.
            generator=torch.Generator().manual_seed(batches.seed),
        )


def _as_fetched(batch: Batch) -> Batch:
    return batch
