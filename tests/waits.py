"""Finds operations for which a host would wait for a GPU, on a CPU."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique2",
    "aten::_unique2",
    "aten::bincount",
    "aten::repeat_interleave",
}


class Waits(TorchDispatchMode):
    """Notes operations that would wait, among those that read what comes from the given tensors."""

    def __init__(self, on_device: list[Tensor]) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._held = list(on_device)  # held, so that no id is given out twice
        self._ids = {id(tensor) for tensor in on_device}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        reads_device = any(id(tensor) in self._ids for tensor in inputs)
        name = func.name().partition(".")[0]
        picks_by_mask = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            tensor.dtype == torch.bool and id(tensor) in self._ids for tensor in inputs[1:]
        )
        if reads_device and (name in WAITING or picks_by_mask):
            self.found.add(name)
        result = func(*args, **(kwargs or {}))
        if reads_device:
            new = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self._held += new
            self._ids |= {id(tensor) for tensor in new}
        return result
