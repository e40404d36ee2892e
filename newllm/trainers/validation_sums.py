"""Sums over the batches of a validation, whichever process scored which batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from newllm import ranks


class BatchSums:
    """Named sums, added up in the order of the batches: their digits do not depend on the number of processes.

    Weighing is the summands' own affair: they count tokens.
    """

    def __init__(self) -> None:
        self._parts: dict[int, dict[str, Any]] = {}

    def add(self, batch: dict[str, Tensor], batch_index: int, found: dict[str, Any]) -> None:
        """Keep what a batch gave: values that can be added."""
        # A rank counts its own batches only; their first sample tells where they stand among all.
        number = batch_index if ranks.world_size() == 1 else int(batch["sample_id"][0])
        self._parts[number] = self._parts.get(number, {}) | found

    def total(self) -> dict[str, Any]:
        """Return the sums over the batches of all ranks; a batch that two ranks scored counts once."""
        parts: dict[int, dict[str, Any]] = {}
        for said in ranks.said_by_all(self._parts):
            parts |= said
        sums: dict[str, Any] = {}
        for _, found in sorted(parts.items()) if ranks.world_size() > 1 else parts.items():
            for name, value in found.items():
                sums[name] = sums[name] + value if name in sums else value
        return sums
