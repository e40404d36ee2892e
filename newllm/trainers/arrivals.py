"""Tensors on their way from a GPU to the host: a training step goes on while they travel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Arrivals:
    """Keeps apart what was sent and what has arrived; nothing is put in its place before `settle` is asked for it."""

    def __init__(self) -> None:
        self._expected: list[tuple[Tensor, Callable[[Tensor], None], torch.cuda.Event]] = []

    def send(self, tensor: Tensor, put: Callable[[Tensor], None]) -> None:
        """Have `put` called with the tensor on the host: at once if it is there, else when it is asked for.

        Args:
            tensor: of any device; may change once the call has returned.
            put: puts it in its place.
        """
        if tensor.device.type != "cuda":
            put(tensor)
            return
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._expected.append((host, put, arrived))

    def settle(self) -> None:
        """Put everything that was sent in its place, in the order in which it was."""
        while self._expected:
            host, put, arrived = self._expected.pop(0)
            arrived.synchronize()
            put(host)

    def forget(self) -> None:
        """Leave out what has not been put in its place."""
        self._expected.clear()
