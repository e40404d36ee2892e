"""The contexts of every position of a stream, in RAM or in a memory-mapped file.

N: positions. W: values kept of a position.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor

from newllm.arrivals import Arrivals, sent_to
from newllm.trainers.lagged_cache import free_for, map_file

SHARE_OF_FREE = 0.9


class ContextCache:
    """Contexts [N, W] in fp32, read and written by position.

    Args:
        contexts: [N, W], in RAM or memory-mapped.
        arrivals: of everything that is written to this memory, by other caches over it too; None if there are none.
    """

    def __init__(self, contexts: Tensor, arrivals: Arrivals | None = None) -> None:
        self._contexts, self._arrivals = contexts, arrivals or Arrivals()

    @property
    def contexts(self) -> Tensor:
        """All of them [N, W], everything written in its place."""
        self._arrivals.settle()
        return self._contexts

    @classmethod
    def empty(cls, num_positions: int, width: int, *, path: Path | None = None) -> ContextCache:
        """Return a cache of zeros, or what the file holds if it is there.

        Args:
            num_positions: N.
            width: W.
            path: file to keep them in; None keeps them in RAM.
        Raises:
            ValueError: they do not fit, or the file is of another configuration.
        """
        check_room(num_positions, width, path)
        shape = (num_positions, 1, width)
        kept = torch.zeros(shape) if path is None else map_file(path, shape, "fp32")
        return cls(kept.view(num_positions, width))

    def last(self, width: int) -> ContextCache:
        """Return the last values of every position as a cache of their own, over the same memory."""
        return ContextCache(self._contexts[:, -width:], self._arrivals)

    @property
    def nbytes(self) -> int:
        """Bytes of all contexts."""
        return self._contexts.nbytes

    def read(self, positions_1N: Tensor, *, like: Tensor) -> Tensor:
        """Return the contexts of positions [1, n, W], of the device and dtype of another tensor."""
        return sent_to(self.contexts[positions_1N.cpu()], like.device, like.dtype)

    def write(self, positions_1N: Tensor, contexts_1NW: Tensor) -> None:
        """Keep contexts; one that is not finite leaves what was there.

        From a GPU they travel while the step goes on, and are put in their places before any is asked for.
        """
        self._arrivals.send(contexts_1NW.detach().float()[0], partial(self._put, positions_1N.cpu()[0]))

    def _put(self, positions_N: Tensor, contexts_NW: Tensor) -> None:
        is_finite = contexts_NW.isfinite().all(dim=-1)
        self._contexts[positions_N[is_finite]] = contexts_NW[is_finite]


def check_room(num_positions: int, width: int, path: Path | None) -> None:
    """Raise unless the contexts of a stream fit where they are to be kept.

    Raises:
        ValueError: they do not; the message gives both figures.
    """
    needed = num_positions * width * 4
    if path is None:
        free, place, other = psutil.virtual_memory().available, "of free memory", "trainer.cache=disk or "
    else:
        free, place, other = free_for(path), f"free on the disk of {path.parent}", ""
    if needed > SHARE_OF_FREE * free:
        raise ValueError(
            f"trainer.cache: contexts of {num_positions:,} positions x {width} values x 4 bytes need {needed / 2**30:.2f} GiB, there "
            f"are {free / 2**30:.2f} GiB {place}. Allowed: at most {SHARE_OF_FREE:.0%} of it. "
            f"Choose {other}a smaller data.max_train_blocks."
        )
