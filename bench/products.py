"""The matrix products of a step, and nothing else: what is left of its duration when everything between them is free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, torch.ops.mkldnn._linear_pointwise}


class _Noted(TorchDispatchMode):
    """Notes every product that is computed, forward and backward, with the tensors it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            self.calls.append(lambda: func(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def products_alone(step: Callable[[], object]) -> Callable[[], object]:
    """Return a call of the products that one step computes, one after another, from the tensors it computed them from."""
    with _Noted() as noted:
        step()
    assert noted.calls, "a step without a matrix product"

    def call() -> None:
        with torch.no_grad():
            for product in noted.calls:
                product()

    return call
