"""How the loss falls with the amount of training text: power laws with and without an irreducible loss, and their uncertainty.

P: points, one for each training run. G: exponents on a grid. R: resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import linregress

Array = NDArray[np.float64]
Verdict = Literal["DEGRADING", "IMPROVING", "STABLE", "UNDECIDED"]

LEAST_SIZES = 3
HUBER_NATS = 1e-3
VERDICT_ALPHA = 0.01
RESAMPLES = 1000
LEVEL = 0.95
_ALPHAS = np.arange(0.01, 2.0, 0.02)
_FINE = np.linspace(-0.02, 0.02, 21)
_ROWS_AT_ONCE = 32  # so that they stay in the cache
_SWEEPS, _FINE_SWEEPS = 3, 15  # of reweighting: enough to find the place on the grid, and to settle on it


@dataclass(frozen=True)
class PowerLaw:
    """L(N) = E + A * N^-alpha, nats per token, by the least Huber loss.

    Attributes:
        floor: E >= 0, nats per token: what no amount of this text would remove.
        factor: A >= 0.
        alpha: from 0.01 to 2; at an end of this range the points say no more than that.
    """

    floor: float
    factor: float
    alpha: float

    def __call__(self, sizes: Array) -> Array:
        """Return the losses of training texts of the given sizes."""
        return self.floor + self.factor * np.asarray(sizes, dtype=np.float64) ** -self.alpha


@dataclass(frozen=True)
class LogLine:
    """ln PPL = a + alpha * ln N by least squares: a straight line has no irreducible loss, so its slope depends on the sizes.

    Attributes:
        intercept: a.
        alpha: slope, negative where more text helps.
        r_squared, p_value, standard_error: of the slope.
    """

    intercept: float
    alpha: float
    r_squared: float
    p_value: float
    standard_error: float


@dataclass(frozen=True)
class LogLogLine:
    """ln L = ln A - alpha * ln N by least squares: the power law that leaves the irreducible loss out, and so bends alpha to 0.

    Attributes:
        factor: A, nats per token.
        alpha: positive where more text helps.
    """

    factor: float
    alpha: float


@dataclass(frozen=True)
class Window:
    """A run of consecutive sizes and the laws fitted to it.

    Attributes:
        sizes: distinct training sizes, tokens.
        law: with an irreducible loss.
        alphas: its alpha in every resample [R]; None where as many parameters as points leave nothing to resample.
        line: of perplexity.
        log_log: of the loss, without an irreducible one.
    """

    sizes: tuple[float, ...]
    law: PowerLaw
    alphas: Array | None
    line: LogLine
    log_log: LogLogLine

    @property
    def interval(self) -> tuple[float, float] | None:
        """The middle 95 % of alpha over resamples."""
        return None if self.alphas is None else _middle(self.alphas)


@dataclass(frozen=True)
class Change:
    """How alpha changes from one window to the next.

    Attributes:
        alpha: difference of the fitted exponents.
        interval: the middle 95 % of the difference over resamples; None where there are none.
        verdict: IMPROVING or DEGRADING where alpha rises or falls by more than 0.01 and the interval excludes 0; STABLE where the
            change is within 0.01 and the interval excludes 0 or lies within 0.01; UNDECIDED else.
    """

    alpha: float
    interval: tuple[float, float] | None
    verdict: Verdict


def check_points(sizes: Sequence[float], losses: Sequence[float]) -> None:
    """Raise where the points carry no power law.

    Raises:
        ValueError: fewer than 3 distinct sizes, sizes that are not positive, or losses that are not finite.
    """
    distinct = len(set(sizes))
    if distinct < LEAST_SIZES:
        raise ValueError(
            f"scaling: {len(sizes)} points of {distinct} sizes carry no fit of three parameters. Allowed: at least {LEAST_SIZES} "
            "distinct sizes. Train on more sizes."
        )
    if min(sizes) <= 0 or not np.isfinite(losses).all():
        raise ValueError(
            "scaling: a size is not positive or a loss not finite. Allowed: sizes above 0 and finite losses. Leave such runs out."
        )


def fit_power_law(sizes: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """Return the power law with an irreducible loss that fits best.

    For each alpha on a grid, E and A follow by non-negative least squares, reweighted to the Huber loss; then the grid is refined
    around the best (variable projection).

    Args:
        sizes: of the training texts, tokens; several runs may share one [P].
        losses: nats per token [P].
    Raises:
        ValueError: what `check_points` refuses.
    Source: parametric form and Huber loss of Hoffmann et al. (2022), approach 3; of residuals in nats, not of logarithms.
    """
    check_points(sizes, losses)
    floors, factors, alphas = _fit(np.asarray(sizes, np.float64), np.asarray(losses, np.float64)[None])
    return PowerLaw(float(floors[0]), float(factors[0]), float(alphas[0]))


def fit_log_line(sizes: Sequence[float], losses: Sequence[float]) -> LogLine:
    """Return the straight line through ln PPL, which is the loss in nats, over ln N.

    Raises:
        ValueError: what `check_points` refuses.
    """
    check_points(sizes, losses)
    found = linregress(np.log(sizes), losses)
    return LogLine(
        float(found.intercept), float(found.slope), float(found.rvalue**2), float(found.pvalue), float(found.stderr)
    )


def fit_log_log(sizes: Sequence[float], losses: Sequence[float]) -> LogLogLine:
    """Return the power law without an irreducible loss, to see how far alpha is off by that.

    Raises:
        ValueError: what `check_points` refuses.
    """
    check_points(sizes, losses)
    found = linregress(np.log(sizes), np.log(losses))
    return LogLogLine(float(np.exp(found.intercept)), -float(found.slope))


def fit_windows(
    sizes: Sequence[float], losses: Sequence[float], *, window: int, resamples: int = RESAMPLES, seed: int = 0
) -> list[Window]:
    """Return the laws of every run of `window` consecutive sizes.

    Resamples add residuals to the fitted losses, drawn from those of all windows together and widened by what the parameters took
    up. A point that lies in two windows gets the same residual in both, so that their alphas can be subtracted.

    Args:
        sizes: of the training texts, tokens [P].
        losses: nats per token [P].
        window: distinct sizes in each.
        resamples: R.
        seed: of the resamples.
    Raises:
        ValueError: a window below 3 sizes or above those there are, or what `check_points` refuses.
    """
    check_points(sizes, losses)
    values, targets, distinct = np.asarray(sizes, np.float64), np.asarray(losses, np.float64), sorted(set(sizes))
    if not LEAST_SIZES <= window <= len(distinct):
        raise ValueError(
            f"window={window}: does not fit {len(distinct)} sizes. Allowed: {LEAST_SIZES} to {len(distinct)}. "
            "Choose another window or train on more sizes."
        )
    spans = [distinct[first : first + window] for first in range(len(distinct) - window + 1)]
    members = [np.isin(values, span) for span in spans]
    laws = [fit_power_law(list(values[inside]), list(targets[inside])) for inside in members]
    noise = _noise(values, targets, members, laws, resamples, seed)
    found = []
    for span, inside, law in zip(spans, members, laws, strict=True):
        own_sizes, own_losses = list(values[inside]), list(targets[inside])
        alphas = None if noise is None else _fit(values[inside], law(values[inside]) + noise[:, inside])[2]
        lines = fit_log_line(own_sizes, own_losses), fit_log_log(own_sizes, own_losses)
        found.append(Window(tuple(span), law, alphas, *lines))
    return found


def change_of(before: Window, after: Window) -> Change:
    """Return how alpha changes between two windows that were fitted together."""
    difference = after.law.alpha - before.law.alpha
    if before.alphas is None or after.alphas is None:
        return Change(difference, None, "UNDECIDED")
    interval = _middle(after.alphas - before.alphas)
    return Change(difference, interval, _verdict(difference, interval))


def _verdict(difference: float, interval: tuple[float, float]) -> Verdict:
    low, high = interval
    if low <= 0 <= high:
        return "STABLE" if max(-low, high) <= VERDICT_ALPHA else "UNDECIDED"
    if abs(difference) <= VERDICT_ALPHA:
        return "STABLE"
    return "IMPROVING" if difference > 0 else "DEGRADING"


def _middle(values: Array) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _noise(
    sizes: Array,
    losses: Array,
    members: Sequence[NDArray[np.bool_]],
    laws: Sequence[PowerLaw],
    resamples: int,
    seed: int,
) -> Array | None:
    """Residuals for every point in every resample [R, P]; None where the fits pass through all their points."""
    pooled = []
    for inside, law in zip(members, laws, strict=True):
        count = int(inside.sum())
        if count <= LEAST_SIZES:
            return None
        residuals = losses[inside] - law(sizes[inside])
        pooled.append((residuals - residuals.mean()) * np.sqrt(count / (count - LEAST_SIZES)))
    return np.random.default_rng(seed).choice(np.concatenate(pooled), size=(resamples, len(sizes)))


def _fit(sizes: Array, losses_RP: Array) -> tuple[Array, Array, Array]:
    """E, A and alpha [R] of each row of losses."""
    # Sizes over their geometric mean: powers of tokens as they are would leave A's scale to alpha.
    scale = float(np.exp(np.log(sizes).mean()))
    relative = sizes / scale
    rows = len(losses_RP)
    coarse = np.broadcast_to(_ALPHAS, (rows, len(_ALPHAS)))
    best = _best(relative, losses_RP, coarse, _SWEEPS)[2]
    fine = np.clip(best[:, None] + _FINE, _ALPHAS[0], _ALPHAS[-1])
    floors, factors, alphas = _best(relative, losses_RP, fine, _FINE_SWEEPS)
    return floors, factors * scale**alphas, alphas


def _best(sizes: Array, losses_RP: Array, alphas_RG: Array, sweeps: int) -> tuple[Array, Array, Array]:
    """E, A and alpha [R] with the least Huber loss among each row's alphas."""
    parts = [slice(first, first + _ROWS_AT_ONCE) for first in range(0, len(losses_RP), _ROWS_AT_ONCE)]
    found = [_best_of_few(sizes, losses_RP[part], alphas_RG[part], sweeps) for part in parts]
    floors, factors, alphas = (np.concatenate(column) for column in zip(*found, strict=True))
    return floors, factors, alphas


def _best_of_few(sizes: Array, losses_RP: Array, alphas_RG: Array, sweeps: int) -> tuple[Array, Array, Array]:
    powers, losses = sizes ** -alphas_RG[..., None], losses_RP[:, None]  # [R, G, P], [R, 1, P]
    floor, factor = _non_negative(powers, losses, np.ones_like(powers))
    residuals = np.abs(losses - floor[..., None] - factor[..., None] * powers)
    for _ in range(sweeps):
        floor, factor = _non_negative(powers, losses, HUBER_NATS / np.maximum(residuals, HUBER_NATS))
        residuals = np.abs(losses - floor[..., None] - factor[..., None] * powers)
    huber = np.where(residuals <= HUBER_NATS, residuals**2 / 2, HUBER_NATS * (residuals - HUBER_NATS / 2))
    picked = np.arange(len(powers)), huber.sum(-1).argmin(-1)
    return floor[picked], factor[picked], alphas_RG[picked]


def _non_negative(powers: Array, losses: Array, weights: Array) -> tuple[Array, Array]:
    """E and A [...], neither below 0, by weighted least squares of losses on 1 and powers, all [..., P].

    With two columns the best non-negative pair is the free one or lies on an axis: no iteration is needed.
    """
    weighted = weights * powers
    total, along, squared = weights.sum(-1), weighted.sum(-1), (weighted * powers).sum(-1)
    level, product = (weights * losses).sum(-1), (weighted * losses).sum(-1)
    determinant = total * squared - along**2
    safe = np.where(determinant > 0, determinant, 1.0)
    floor, factor = (squared * level - along * product) / safe, (total * product - along * level) / safe
    flat, steep = level / total, product / squared  # without the power, and without the floor
    floor, factor = (
        np.where(floor < 0, 0.0, np.where(factor < 0, flat, floor)),
        np.where(floor < 0, steep, np.where(factor < 0, 0.0, factor)),
    )
    return np.maximum(floor, 0.0), np.maximum(factor, 0.0)
