"""What a few seeds allow to say: mean, spread, and intervals of differences."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
EXACT_UP_TO = 6  # 6^6 = 46,656 resamples are all there are


@dataclass(frozen=True)
class Difference:
    """How much higher one group's metric is than another's, seed by seed.

    Attributes:
        seeds: seeds that both groups have.
        mean: mean difference over these seeds.
        low, high: 95 % bootstrap interval of the mean; None with fewer than two pairs.
    """

    seeds: tuple[int, ...]
    mean: float
    low: float | None
    high: float | None


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation (n - 1); no deviation of a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def interval(values: Sequence[float], *, share: float = 0.95) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean.

    Few values are resampled in all possible ways, so that the interval is the same every time; many by a fixed seed.
    It can never leave the range of the values: with two or three it is that range, nearly.
    """
    array = np.asarray(values, dtype=np.float64)
    if len(array) <= EXACT_UP_TO:
        picks = np.array(list(itertools.product(range(len(array)), repeat=len(array))))
    else:
        picks = np.random.default_rng(0).integers(len(array), size=(RESAMPLES, len(array)))
    means = array[picks].mean(axis=1)
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def weighted_mean(
    sums: np.ndarray, weights: np.ndarray, *, resamples: int = RESAMPLES, share: float = 0.95
) -> tuple[float, float | None, float | None]:
    """Return total sum over total weight, and its percentile interval over resampled units; no interval of a single one.

    Args:
        sums: of each unit, for instance nats of a text [N].
        weights: of each unit, for instance its targets [N].
        resamples: draws of N units, with a fixed seed.
        share: of the resamples inside the interval.
    """
    mean = float(sums.sum() / weights.sum())
    if len(sums) == 1:
        return mean, None, None
    # How often each unit is drawn: as many numbers as units, however heavy they are.
    drawn = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=resamples)
    low, high = np.quantile((drawn @ sums) / (drawn @ weights), [(1 - share) / 2, (1 + share) / 2])
    return mean, float(low), float(high)


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Return how much higher `values` are than `reference`, over the seeds of both; None where they share none."""
    seeds = tuple(sorted(values.keys() & reference.keys()))
    if not seeds:
        return None
    differences = [values[seed] - reference[seed] for seed in seeds]
    low, high = interval(differences) if len(seeds) > 1 else (None, None)
    return Difference(seeds, float(np.mean(differences)), low, high)
