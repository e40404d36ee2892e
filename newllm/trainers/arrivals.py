"""Tensors on their way between the host and a GPU: a training step goes on while they travel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Arrivals:
    """Keeps apart what was sent and what has arrived: what is on the way is put in its place by the next `send` or `settle`."""

    def __init__(self) -> None:
        self._expected: tuple[Tensor, Callable[[Tensor], None], torch.cuda.Event] | None = None

    def send(self, tensor: Tensor, put: Callable[[Tensor], None]) -> None:
        """Have `put` called with the tensor on the host: at once if it is there, else when it has come.

        One is on the way at most: a sender that asks for nothing would else fill the host's pinned memory.

        Args:
            tensor: of any device; may change once the call has returned.
            put: puts it in its place.
        """
        self.settle()
        if self._is_there(tensor):
            put(tensor)
        else:
            self._expect(tensor, put)

    def settle(self) -> None:
        """Put what was sent in its place."""
        if self._expected is None:
            return
        (host, put, arrived), self._expected = self._expected, None
        arrived.synchronize()
        put(host)

    @staticmethod
    def _is_there(tensor: Tensor) -> bool:
        return tensor.device.type != "cuda"

    def _expect(self, tensor: Tensor, put: Callable[[Tensor], None]) -> None:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._expected = host, put, arrived

    def forget(self) -> None:
        """Leave out what has not been put in its place."""
        self._expected = None


def sent_to(rows: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return rows of the host in another dtype on a device; nothing waits until they are there."""
    if device.type == "cuda":
        rows = rows.pin_memory()
    return rows.to(device, non_blocking=True).to(dtype)
