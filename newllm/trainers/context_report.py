"""What an iteration over a stream's contexts is recorded by, and what the contexts are like when they have been swept clean.

n: positions of a slice. C: context size.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from newllm.data.positions import Positions
from newllm.evaluation.context_statistics import effective_rank, rank_report
from newllm.losses.diversity import DiversityLoss
from newllm.losses.fixed_point import movement
from newllm.models.context import ContextLM
from newllm.recurrence import sweep
from newllm.trainers.context_cache import ContextCache
from newllm.trainers.context_stream import context_map, settle, slices

SUMS = ("converged", "moved", "diversity", "norm", "norm_square")  # diversity: times positions
# Of log10 of a context's mean squared change: finer than one would look.
EXPONENTS = (-12.0, 2.0)
BINS = 140


@dataclass
class IterationSums:
    """Sums over the slices of one sweep over a stream, on the device of the contexts until they are asked for."""

    positions: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(len(SUMS), dtype=torch.float64))
    norm_max: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    exponents: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))

    @torch.no_grad()
    def add(self, new: Tensor, moved: Tensor, diversity: Tensor, *, threshold: float) -> None:
        """Add a slice: its contexts [1, n, C], how far each moved [1, n] (mean squared), and their diversity loss."""
        count, norms = moved.numel(), torch.linalg.vector_norm(new, dim=-1).double()
        moved = moved.double()
        converged = (moved < threshold).sum().double()
        sums = [converged, moved.sum(), diversity.double() * count, norms.sum(), norms.square().sum()]
        self.positions += count
        self.sums = self.sums.to(new.device) + torch.stack(sums)
        self.norm_max = torch.maximum(self.norm_max.to(new.device), norms.max())
        self.exponents = self.exponents.to(new.device) + _bins(moved.log10().flatten())

    def metrics(self) -> dict[str, float]:
        """Return share of converged contexts, both losses (diversity: mean over slices), and the contexts' L2 norms."""
        converged, moved, diversity, norm, square = (total / self.positions for total in self.sums.tolist())
        return {
            "context/converged_share": converged,
            "context/fixed_point_loss": moved,
            "context/diversity_loss": diversity,
            "context/norm_mean": norm,
            "context/norm_std": math.sqrt(max(square - norm**2, 0.0)),
            "context/norm_max": self.norm_max.item(),
        }

    @property
    def converged(self) -> int:
        """How many contexts moved less than the threshold."""
        return round(self.sums[0].item())

    def histogram(self) -> Tensor:
        """Return about a thousand values of log10 of the mean squared change, spread as those of all contexts are."""
        low, high = EXPONENTS
        centres = low + (torch.arange(BINS) + 0.5) * (high - low) / BINS
        return centres.repeat_interleave((1000 * self.exponents.cpu() / max(self.positions, 1)).round().long())


def _bins(exponents_N: Tensor) -> Tensor:
    """How many lie in each of the bins between `EXPONENTS`, the outer ones open; by order, which a GPU gets alike every time."""
    borders = torch.linspace(*EXPONENTS, BINS + 1, dtype=exponents_N.dtype, device=exponents_N.device)[1:-1]
    below = torch.searchsorted(exponents_N.sort().values, borders)
    return torch.cat([below, below.new_full((1,), len(exponents_N))]).diff(prepend=below.new_zeros(1))


def share(count: int, total: int) -> str:
    """Return a share with its numbers: `12.5% (1/8)`."""
    return f"{count / total:.1%} ({count}/{total})"


def rank_share(cache: ContextCache, rows: Tensor) -> float:
    """Return the effective rank of some contexts, uncentred, over their width."""
    contexts = cache.contexts[rows]
    return effective_rank(contexts) / contexts.shape[1]


@torch.no_grad()
def clean_report(
    model: ContextLM,
    positions: Positions,
    cache: ContextCache,
    loss: DiversityLoss,
    rows: Tensor,
    *,
    sweeps: int,
    slice_tokens: int,
    threshold: float,
    tolerance: float,
) -> dict[str, Any]:
    """Sweep a stream's contexts clean from zeros, in place, and return what they are like.

    What training left in them plays no part: its noise stays for as many sweeps as contexts remember tokens, and held-out
    contexts have none of it. So figures of both texts compare.

    Args:
        model: gives the context block, as trained.
        positions: of the stream.
        cache: its contexts.
        loss: diversity.
        rows: positions whose contexts the effective rank is taken of.
        sweeps: of all positions at once, at least 1; as many as training has made, to say whether contexts stand still by then.
        slice_tokens: n.
        threshold: mean squared change below which a context counts as converged.
        tolerance: relative change at which the sweeps stop.
    Returns:
        `converged_share` and `fixed_point_loss` of the last of these sweeps, `converged_after` their number; `effective_rank` (over
        C, uncentred and centred), `diversity_loss`, `sweeps` and `exact_positions` (see `Settling`) of contexts swept on to the
        tolerance.
    """
    like = next(model.parameters())
    cache.contexts.zero_()
    for _ in range(sweeps):
        moved, before = IterationSums(), like.new_zeros(1, model.context_dim)
        for batch in slices(positions, slice_tokens, device=like.device):
            old = cache.read(batch["position"], like=like)
            new = sweep(context_map(model, batch), old, before)
            moved.add(new, movement(new, old), loss(new[0]), threshold=threshold)
            before = old[:, -1]
            cache.write(batch["position"], new)
    settling = settle(model, positions, cache, slice_tokens=slice_tokens, tolerance=tolerance)
    spread = 0.0
    for batch in slices(positions, slice_tokens, device=like.device):
        spread += loss(cache.read(batch["position"], like=like)[0]).item() * batch["position"].numel()
    return {
        "converged_share": share(moved.converged, moved.positions),
        "converged_after": sweeps,
        "fixed_point_loss": moved.metrics()["context/fixed_point_loss"],
        "diversity_loss": spread / len(positions),
        "effective_rank": rank_report(cache.contexts[rows]),
        **asdict(settling),
    }
