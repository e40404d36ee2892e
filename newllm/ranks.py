"""The processes of one run, seen from one of them: its number, their number, and what they tell each other.

A run of one process is rank 0 of 1, and all of this is free there. Functions that return what others said are called by
all ranks together, or all wait.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if _is_joined() else 1


def rank() -> int:
    """Return the number of this process, from 0; rank 0 writes the run folder."""
    return dist.get_rank() if _is_joined() else 0


def said_by_all(value: T) -> list[T]:
    """Return every rank's value, in the order of the ranks; anything that can be pickled."""
    if world_size() == 1:
        return [value]
    found: list[T] = [value] * world_size()
    dist.all_gather_object(found, value)
    return found


def told_to_first(value: T) -> list[T] | None:
    """Return every rank's value on rank 0, None on the others: for what is too large to be everywhere."""
    if world_size() == 1:
        return [value]
    found: list[T] | None = [value] * world_size() if rank() == 0 else None
    dist.gather_object(value, found, dst=0)
    return found


def summed(tensor: Tensor) -> Tensor:
    """Return the sum of every rank's tensor, without gradient."""
    total = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def exchanged(tensor: Tensor, counts: list[int]) -> tuple[Tensor, list[int]]:
    """Send rows to every rank and return the rows received, by rank, with their counts.

    Args:
        tensor: rows in the order of the ranks they go to, on the CPU.
        counts: how many go to each rank.
    """
    incoming = torch.zeros(world_size(), dtype=torch.int64)
    dist.all_to_all_single(incoming, torch.tensor(counts))
    received = [int(count) for count in incoming.tolist()]
    rows = tensor.new_empty(sum(received), *tensor.shape[1:])
    dist.all_to_all_single(rows, tensor.contiguous(), received, counts)
    return rows, received
