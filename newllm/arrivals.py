"""Tensors on their way between the host and a GPU: a training step goes on while they travel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OnTheWay:
    """A tensor whose copy to the host may still be on its way.

    Attributes:
        host: where it arrives.
        arrived: when it is there; None where it was never elsewhere.
    """

    host: Tensor
    arrived: torch.cuda.Event | None

    def wait(self) -> Tensor:
        """Return the tensor on the host; waits until it is there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host


def to_host(tensor: Tensor) -> OnTheWay:
    """Start the copy of a tensor to the host; one that is there already is not copied."""
    if tensor.device.type != "cuda":
        return OnTheWay(tensor, None)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return OnTheWay(host, arrived)


class Arrivals:
    """Keeps apart what was sent and what has arrived: what is on the way is put in its place by the next `send` or `settle`."""

    def __init__(self) -> None:
        self._expected: tuple[OnTheWay, Callable[[Tensor], None]] | None = None

    def send(self, tensor: Tensor, put: Callable[[Tensor], None]) -> None:
        """Have `put` called with the tensor on the host: at once if it is there, else when it has come.

        One is on the way at most: a sender that asks for nothing would else fill the host's pinned memory.

        Args:
            tensor: of any device; may change once the call has returned.
            put: puts it in its place.
        """
        self.settle()
        sent = to_host(tensor)
        if sent.arrived is None:
            put(sent.host)
        else:
            self._expected = sent, put

    def settle(self) -> None:
        """Put what was sent in its place."""
        if self._expected is None:
            return
        (sent, put), self._expected = self._expected, None
        put(sent.wait())

    def forget(self) -> None:
        """Leave out what has not been put in its place."""
        self._expected = None


def sent_to(rows: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return rows of the host in another dtype on a device; nothing waits until they are there."""
    if device.type == "cuda":
        rows = rows.pin_memory()
    return rows.to(device, non_blocking=True).to(dtype)
