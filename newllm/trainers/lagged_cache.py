"""The states of every sample's last visit, kept by sample id.

N: training samples.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from torch import Tensor

from newllm.arrivals import Arrivals, sent_to

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# numpy knows no bf16: on disk its two bytes travel as int16.
DISK_DTYPES = {"bf16": np.int16, "fp16": np.float16, "fp32": np.float32}


class LaggedCache:
    """States [N, T, D] in RAM or in a memory-mapped file, gathered and scattered by sample id.

    Samples are found by their id alone, so shuffling, workers, dropped batches and resumption keep each with its own states.

    Args:
        num_samples: N.
        length: T, tokens of a block.
        dim: D.
        dtype: how states are stored.
        path: file to keep them in; None keeps them in RAM.
        sharers: processes that each keep so many states in the same RAM or on the same disk.
    Raises:
        ValueError: the states do not fit, or the file is of another configuration.
    """

    def __init__(
        self,
        num_samples: int,
        length: int,
        dim: int,
        *,
        dtype: Literal["bf16", "fp16", "fp32"],
        path: Path | None = None,
        sharers: int = 1,
    ) -> None:
        self.shape, self.dtype, self.path = (num_samples, length, dim), DTYPES[dtype], path
        self.visits = torch.zeros(num_samples, dtype=torch.int64)
        self._arrivals = Arrivals()
        check_fits(self.nbytes, path, sharers=sharers)
        if path is None:
            self.states = torch.zeros(self.shape, dtype=self.dtype)
        else:
            self.states = map_file(path, self.shape, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return cache_bytes(*self.shape, self.dtype)

    def is_visited(self, sample_ids: Tensor) -> Tensor:
        """Return True for samples whose states are known, [B]."""
        self._arrivals.settle()
        return self.visits[sample_ids.cpu()] > 0

    def gather(self, sample_ids: Tensor, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the samples' states of their last visit [B, T, D]; zeros before the first."""
        self._arrivals.settle()
        return sent_to(self.states[sample_ids.cpu()], device, dtype)

    def scatter(self, sample_ids: Tensor, states_BTD: Tensor) -> None:
        """Keep the samples' states; nothing of their graph stays. A sample whose states are not finite keeps those it had.

        From a GPU they travel while the step goes on, and are put in their places before anything is asked of the cache.
        """
        self._arrivals.send(states_BTD.detach().to(self.dtype), partial(self._put, sample_ids))

    def forget(self) -> None:
        """Count every sample as never visited."""
        self._arrivals.forget()
        self.visits.zero_()

    def state_dict(self, *, with_states: bool) -> dict[str, Tensor]:
        """Return what a checkpoint carries: the visits, and the states if asked for."""
        self._arrivals.settle()
        carried = {"visits": self.visits.clone()}
        return carried | ({"states": self.states.clone()} if with_states else {})

    def load_state_dict(self, carried: dict[str, Tensor]) -> bool:
        """Take over what a checkpoint carried; without states every sample counts as never visited.

        Returns:
            Whether the states were there.
        """
        if "states" not in carried:
            self.forget()
            return False
        self._arrivals.forget()
        self.visits.copy_(carried["visits"])
        self.states.copy_(carried["states"])
        return True

    def _put(self, sample_ids: Tensor, states: Tensor) -> None:
        is_finite = states.flatten(1).isfinite().all(dim=1)
        rows = sample_ids.cpu()[is_finite]
        self.states[rows] = states[is_finite]
        self.visits[rows] += 1


def cache_bytes(num_samples: int, length: int, dim: int, dtype: torch.dtype) -> int:
    """Return the bytes of a cache."""
    return num_samples * length * dim * dtype.itemsize


def check_fits(nbytes: int, path: Path | None, *, sharers: int = 1) -> None:
    """Raise unless the cache fits where it is to be kept.

    Args:
        nbytes: of this process.
        path: file to keep it in; None for RAM.
        sharers: processes that each keep so many bytes there.
    Raises:
        ValueError: it does not; the message gives both figures.
    """
    if path is None:
        free, place, other = psutil.virtual_memory().available, "of free memory", "trainer.cache=disk"
    else:
        free, place, other = free_for(path, sharers=sharers), f"free on the disk of {path.parent}", "trainer.cache=none"
    needed = nbytes * sharers
    if needed > 0.9 * free:
        raise ValueError(
            f"trainer.cache: needs {needed / 2**30:.2f} GiB (samples x tokens x hidden size), there are {free / 2**30:.2f} GiB {place}. "
            f"Allowed: at most 90 % of it. Choose {other}, a smaller data.max_train_blocks or trainer.cache_dtype=bf16."
        )


def free_for(path: Path, *, sharers: int = 1) -> int:
    """Return the bytes free for files on a disk: a run that goes on finds them there, and writes over what they take.

    Args:
        path: of one of the files, which need not be there.
        sharers: how many there are, equally large.
    """
    existing = next(parent for parent in [path, *path.parents] if parent.exists())
    taken = path.stat().st_blocks * 512 if path.exists() else 0  # not its size: pages never written take nothing
    return shutil.disk_usage(existing).free + taken * sharers


def _description(path: Path) -> object:
    """Return what the file says; the text itself where a killed process tore it."""
    text = path.read_text()
    try:
        return json.loads(text)
    except ValueError:
        return text


def map_file(path: Path, shape: tuple[int, int, int], dtype: str) -> Tensor:
    """Memory-map a file, made with zeros where there is none; its description lies beside it.

    Raises:
        ValueError: the file is of another shape or dtype.
    """
    described = {"shape": list(shape), "dtype": dtype}
    beside = path.with_suffix(".json")
    if path.exists() and beside.exists():
        found = _description(beside)
        if found != described:
            raise ValueError(
                f"{path}: holds states of another configuration ({found}, this run needs {described}). "
                "Allowed: a file of the same shape and dtype. Delete it, or resume with the configuration that made it."
            )
        mapped = np.memmap(path, dtype=DISK_DTYPES[dtype], mode="r+", shape=shape)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        mapped = np.memmap(path, dtype=DISK_DTYPES[dtype], mode="w+", shape=shape)
        beside.write_text(json.dumps(described))
    tensor = torch.from_numpy(mapped)
    return tensor.view(torch.bfloat16) if dtype == "bf16" else tensor
