"""What can be said of a set of contexts, and of the map that makes them: rank, contraction, convergence, what they still hold.

N: contexts. C: context size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SLOPE = 0.001  # mean squared change per pass
SCATTER = 0.01  # standard deviation of the mean squared changes
ROWS_PER_DIM = 10


def effective_rank(contexts_NC: Tensor) -> float:
    """Return exp of the entropy of the normalised singular values: from 1 (one direction) to C (all alike), unitless.

    Source: Roy & Vetterli (2007). Of singular values, not of variances: higher than figures made from those.
    """
    values = torch.linalg.svdvals(contexts_NC.double())
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def rank_report(contexts_NC: Tensor) -> dict[str, Any]:
    """Return the effective rank of contexts as they are and around their mean, each over C, and whether N is enough to say so.

    Fewer rows than ten per dim hold the rank down, whatever the contexts are: no figure stands without that.
    """
    num_rows, width = contexts_NC.shape
    ranks = {"uncentred": effective_rank(contexts_NC), "centred": effective_rank(contexts_NC - contexts_NC.mean(0))}
    are_enough = num_rows >= ROWS_PER_DIM * width
    beside = "" if are_enough else f", held down by few rows: {num_rows} < {ROWS_PER_DIM * width}"
    said = {name: f"{rank / width:.1%} ({rank:.1f}/{width}){beside}" for name, rank in ranks.items()}
    return {**said, "rows": num_rows, "rows_are_enough": are_enough}


def agreement(contexts: Tensor, others: Tensor) -> dict[str, float]:
    """Return cosine (mean and least) and mean squared difference of two sets of contexts [..., C]."""
    cosines = nn.functional.cosine_similarity(contexts, others, dim=-1)
    difference = (contexts - others).square().mean()
    return {"cosine_mean": cosines.mean().item(), "cosine_least": cosines.min().item(), "mse": difference.item()}


def spectral_radius(
    step: Callable[[Tensor], Tensor], contexts: Tensor, *, iterations: int, generator: torch.Generator
) -> Tensor:
    """Return the largest absolute eigenvalue of d step / d context at every given context [...], by power iteration.

    Below 1 everywhere, a small change of a context dies out. The mean growth of the last half of the iterations is taken, which
    also holds for complex pairs.

    Args:
        step: contexts [..., C] -> contexts [..., C], every one from the one at its own place.
        contexts: where to linearise.
        iterations: products with the Jacobian; at least 2.
        generator: draws the first direction.
    """
    with torch.enable_grad():
        at = contexts.detach().clone().requires_grad_()
        reached = step(at)
        direction = torch.randn(at.shape, generator=generator, dtype=at.dtype).to(at.device)
        growth = []
        for _ in range(iterations):
            direction = direction / torch.linalg.vector_norm(direction, dim=-1, keepdim=True).clamp_min(1e-30)
            # Its transpose has the same eigenvalues.
            (direction,) = torch.autograd.grad(reached, at, direction, retain_graph=True)
            growth.append(torch.linalg.vector_norm(direction, dim=-1).log())
    return torch.stack(growth[iterations // 2 :]).mean(0).exp()


def verdict(changes: Sequence[float]) -> str:
    """Return CONVERGING, CONVERGED, DIVERGING or UNSTABLE for the mean squared changes from pass to pass; at least two."""
    if len(changes) < 2:
        raise ValueError(f"changes: {len(changes)} cannot show a slope. Allowed: at least 2. Make more passes.")
    slope = float(np.polyfit(np.arange(len(changes)), changes, 1)[0])
    if slope < -SLOPE:
        return "CONVERGING"
    if slope > SLOPE:
        return "DIVERGING"
    return "CONVERGED" if float(np.std(changes)) < SCATTER else "UNSTABLE"


def readout_accuracy(
    contexts_NC: Tensor, tokens_N: Tensor, *, vocab_size: int, num_fitted: int, penalty: float = 1e-3
) -> dict[str, float]:
    """Return how often a linear map of contexts names a token, on rows it was not fitted on, and how often the commonest token is it.

    Args:
        contexts_NC: contexts.
        tokens_N: the token that each is to name.
        vocab_size: tokens.
        num_fitted: first rows, which the map is fitted on by ridge regression; the others are tested.
        penalty: of the ridge, over the mean variance of the contexts.
    """
    mean = contexts_NC[:num_fitted].double().mean(0)
    rows = torch.cat([contexts_NC.double() - mean, contexts_NC.new_ones(len(tokens_N), 1).double()], dim=1)
    fitted, tested = rows[:num_fitted], rows[num_fitted:]
    gram = fitted.T @ fitted
    ridge = penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    # Sums of the rows of each token: one-hot targets would take N * V values.
    sums = fitted.new_zeros(vocab_size, rows.shape[1]).index_add_(0, tokens_N[:num_fitted], fitted)
    named = (tested @ torch.linalg.solve(gram + ridge, sums.T)).argmax(-1)
    commonest = tokens_N[:num_fitted].bincount(minlength=vocab_size).argmax()
    wanted = tokens_N[num_fitted:]
    return {
        "accuracy": (named == wanted).double().mean().item(),
        "commonest_token": (commonest == wanted).double().mean().item(),
    }
