"""The lagged cache of a run of several processes: each keeps some of the samples, rows travel to where they are needed.

N: training samples. W: ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from newllm import ranks
from newllm.arrivals import sent_to
from newllm.trainers.lagged_cache import DTYPES, LaggedCache, cache_bytes


class ShardedCache:
    """States [N, T, D] of which sample i lies with rank i % W, so that W machines hold W times what one does.

    A rank's rows of a batch lie anywhere, as one process would shuffle them: they are fetched before a step and sent home
    after it, rows x T x D values each time. All ranks call each method together. Checkpoints hold the cache of one process,
    so a run may go on with another number of ranks.

    Args:
        num_samples: N.
        length: T, tokens of a block.
        dim: D.
        dtype: how states are stored.
        path: file of this rank's samples; None keeps them in RAM.
        sharers: ranks that keep their samples in the same RAM or on the same disk.
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
        sharers: int,
    ) -> None:
        self.rank, self.world_size = ranks.rank(), ranks.world_size()
        self.nbytes = cache_bytes(num_samples, length, dim, DTYPES[dtype])  # of all ranks together
        self.visits = torch.zeros(num_samples, dtype=torch.int64)  # of all samples, the same on every rank
        own = len(range(self.rank, num_samples, self.world_size))
        if path is not None:
            path = path.with_stem(f"{path.stem}_{self.rank}_of_{self.world_size}")
        self.own = LaggedCache(own, length, dim, dtype=dtype, path=path, sharers=sharers)

    def is_visited(self, sample_ids: Tensor) -> Tensor:
        """Return True for samples whose states are known, [B]."""
        return self.visits[sample_ids.cpu()] > 0

    def gather(self, sample_ids: Tensor, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the samples' states of their last visit [B, T, D]; zeros before the first."""
        ids = sample_ids.cpu()
        states = self.own.states.new_zeros(len(ids), *self.own.states.shape[1:])
        wanted = self.is_visited(ids).nonzero().squeeze(1)
        rows, counts = self._by_owner(ids[wanted])
        asked, askers = ranks.exchanged(ids[wanted][rows], counts)
        found, _ = ranks.exchanged(self.own.states[asked // self.world_size], askers)
        states[wanted[rows]] = found
        return sent_to(states, device, dtype)

    def scatter(self, sample_ids: Tensor, states_BTD: Tensor) -> None:
        """Keep the samples' states; nothing of their graph stays. A sample whose states are not finite keeps those it had."""
        states = states_BTD.detach().to(self.own.dtype).cpu()
        is_finite = states.flatten(1).isfinite().all(dim=1)
        ids, states = sample_ids.cpu()[is_finite], states[is_finite]
        rows, counts = self._by_owner(ids)
        homes, _ = ranks.exchanged(ids[rows], counts)
        arrived, _ = ranks.exchanged(states[rows], counts)
        self.own.states[homes // self.world_size] = arrived
        for visited in ranks.said_by_all(ids):
            self.visits[visited] += 1

    def forget(self) -> None:
        """Count every sample as never visited."""
        self.visits.zero_()

    def state_dict(self, *, with_states: bool) -> dict[str, Tensor]:
        """Return what a checkpoint carries, as one process would have it; the states on rank 0 alone."""
        carried = {"visits": self.visits.clone()}
        shards = ranks.told_to_first(self.own.states) if with_states else None
        if shards is not None:
            states = shards[0].new_empty(len(self.visits), *shards[0].shape[1:])
            for owner, shard in enumerate(shards):
                states[owner :: self.world_size] = shard
            carried["states"] = states
        return carried

    def load_state_dict(self, carried: dict[str, Tensor]) -> bool:
        """Take over this rank's part of what a checkpoint carried; without states every sample counts as never visited.

        Returns:
            Whether the states were there.
        """
        if "states" not in carried:
            self.forget()
            return False
        self.visits.copy_(carried["visits"])
        self.own.states.copy_(carried["states"][self.rank :: self.world_size])
        return True

    def _by_owner(self, sample_ids: Tensor) -> tuple[Tensor, list[int]]:
        """Return the rows in the order of the ranks that keep them, and how many each keeps."""
        owners = sample_ids % self.world_size
        return owners.argsort(stable=True), owners.bincount(minlength=self.world_size).tolist()
