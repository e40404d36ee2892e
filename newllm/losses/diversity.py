"""How far a set of contexts is from spread out: the losses that keep contexts from becoming all the same.

N: contexts. C: context size. All are lower for more spread contexts and take [N, C].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from newllm.config.fields import Share
from newllm.config.schema import LossConfig


@dataclass(frozen=True, kw_only=True)
class DiversityConfig(LossConfig):
    """Contexts that stand still and spread.

    Attributes:
        name: how spread is measured.
        weight: w of (1 - w) * movement + w * diversity.
    """

    reads: ClassVar[str] = "contexts"

    name: Literal["bounded", "mcdl", "nuc", "oacd", "odcm", "sdl"]
    weight: Share


def mean_centred_dispersion(contexts_NC: Tensor) -> Tensor:
    """Return -|C - mean|_F / N (MCDL).

    Behind a LayerNorm of unit gain it is at least -sqrt(C / N): its weight against another loss depends on N. It sees the trace of
    the covariance only, not how many directions share it.
    """
    return -torch.linalg.matrix_norm(_centred(contexts_NC)) / contexts_NC.shape[0]


def off_diagonal_covariance(contexts_NC: Tensor) -> Tensor:
    """Return mean_j relu(1 - sqrt(var_j + 1e-4)) + 0.04 * sum_{i != j} cov_ij^2 / C (ODCM).

    Source: variance and covariance terms of VICReg (Bardes et al., 2022), with their own weights.
    """
    # One context alone has no covariance; 0/0 would spoil the step of all the others.
    covariance = torch.atleast_2d(contexts_NC.T.cov(correction=min(1, len(contexts_NC) - 1)))
    hinge = torch.relu(1 - (covariance.diagonal() + 1e-4).sqrt()).mean()
    return hinge + 0.04 * _off_diagonal_squares(covariance) / contexts_NC.shape[1]


def spectral_diversity(contexts_NC: Tensor) -> Tensor:
    """Return minus the entropy in nats of the normalised singular values of the uncentred contexts (SDL): -ln(effective rank)."""
    values = torch.linalg.svdvals(contexts_NC)
    # The floor leaves directions that are not there without a gradient, which would be infinite.
    shares = (values / values.sum()).clamp_min(1e-12)
    return (shares * shares.log()).sum()


def nuclear_norm(contexts_NC: Tensor) -> Tensor:
    """Return -|C - mean|_* / N (NUC): minus the sum of singular values."""
    return -torch.linalg.svdvals(_centred(contexts_NC)).sum() / contexts_NC.shape[0]


def origin_anchored_dispersion(contexts_NC: Tensor) -> Tensor:
    """Return MCDL + 0.1 * |mean|^2 (OACD)."""
    return mean_centred_dispersion(contexts_NC) + 0.1 * contexts_NC.mean(0).square().sum()


def bounded_spread(contexts_NC: Tensor) -> Tensor:
    """Return mean_j relu(1 - std_j)^2 + sum_{i != j} corr_ij^2 / C: within 0 and C, whatever N is.

    Repeating every context changes nothing, nor does a larger gain once every standard deviation has reached 1.
    """
    num_contexts, width = contexts_NC.shape
    centred = _centred(contexts_NC)
    deviation = (centred.square().mean(0) + 1e-12).sqrt()
    correlation = (centred / deviation).T @ (centred / deviation) / num_contexts  # [C, C]
    return torch.relu(1 - deviation).square().mean() + _off_diagonal_squares(correlation) / width


def _centred(contexts_NC: Tensor) -> Tensor:
    return contexts_NC - contexts_NC.mean(0)


def _off_diagonal_squares(matrix_CC: Tensor) -> Tensor:
    return matrix_CC.square().sum() - matrix_CC.diagonal().square().sum()


DIVERSITY: dict[str, Callable[[Tensor], Tensor]] = {
    "bounded": bounded_spread,
    "mcdl": mean_centred_dispersion,
    "nuc": nuclear_norm,
    "oacd": origin_anchored_dispersion,
    "odcm": off_diagonal_covariance,
    "sdl": spectral_diversity,
}


class DiversityLoss(nn.Module):
    """One of these measures, and its weight.

    Args:
        config: which, and how heavy.
    """

    def __init__(self, config: DiversityConfig) -> None:
        super().__init__()
        self.measure, self.weight = DIVERSITY[config.name], config.weight

    def forward(self, contexts_NC: Tensor) -> Tensor:
        """Return the diversity loss of some contexts, a scalar; in fp32 at least, for sums over many."""
        return self.measure(contexts_NC.to(torch.promote_types(contexts_NC.dtype, torch.float32)))


def build(config: DiversityConfig) -> DiversityLoss:
    """Return the loss that a configuration describes."""
    return DiversityLoss(config)
