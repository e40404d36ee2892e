"""How far contexts moved from one sweep to the next.

C: context size.
"""

from __future__ import annotations

from torch import Tensor


def movement(new: Tensor, previous: Tensor) -> Tensor:
    """Return the mean squared change of every context over its C values [...]; no gradient reaches `previous`.

    Nothing is normalised: divided by their norms, contexts could come closer by growing.

    Args:
        new: contexts of this sweep [..., C].
        previous: contexts of the sweep before, at the same positions [..., C].
    """
    return (new - previous.detach()).square().mean(-1)


def fixed_point_loss(new: Tensor, previous: Tensor) -> Tensor:
    """Return the mean of `movement` over all contexts, a scalar (CVFP loss)."""
    return movement(new, previous).mean()


def is_converged(new: Tensor, previous: Tensor, *, threshold: float) -> Tensor:
    """Return True for contexts that moved less than `threshold`, a mean squared change [...]."""
    return movement(new, previous) < threshold
