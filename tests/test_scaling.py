"""Power laws of the loss over the size of the training text."""

import numpy as np
import pytest
from scipy.optimize import nnls

from newllm.scaling import (
    LogLine,
    LogLogLine,
    PowerLaw,
    Window,
    _non_negative,
    change_of,
    fit_log_line,
    fit_log_log,
    fit_power_law,
    fit_windows,
)

TRUE = PowerLaw(floor=1.8172, factor=482.01, alpha=0.3478)  # of Chinchilla, as refitted by Besiroglu et al. (2024)
SIZES = np.geomspace(1e6, 1e9, 6)


def noisy(seed: int, *, seeds: int = 3, deviation: float = 0.01) -> tuple[list[float], list[float]]:
    sizes = np.repeat(SIZES, seeds)
    noise = np.random.default_rng(seed).normal(0, deviation, len(sizes))
    return list(sizes), list(TRUE(sizes) + noise)


def test_an_exact_law_is_recovered() -> None:
    found = fit_power_law(list(SIZES), list(TRUE(SIZES)))

    assert found.alpha == pytest.approx(0.3478, abs=1e-3)  # half a step of the finest grid
    assert found.floor == pytest.approx(1.8172, abs=2e-3)
    assert found.factor == pytest.approx(482.01, rel=0.01)


def test_a_known_law_lies_within_its_interval() -> None:
    for seed in range(2):
        (window,) = fit_windows(*noisy(seed), window=6, resamples=100)

        assert window.interval is not None
        low, high = window.interval
        assert low <= TRUE.alpha <= high
        assert high - low < 0.1
        assert window.law.floor == pytest.approx(TRUE.floor, abs=0.1)


@pytest.mark.slow
def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    windows = [fit_windows(*noisy(seed), window=6, resamples=100)[0] for seed in range(20)]

    held = sum(low <= TRUE.alpha <= high for low, high in (w.interval for w in windows if w.interval is not None))
    assert 16 <= held <= 20  # 95 % of 20; fewer than 16 would come by chance once in 400 times


def test_without_an_irreducible_loss_alpha_is_far_too_small() -> None:
    log_log = fit_log_log(list(SIZES), list(TRUE(SIZES)))

    assert log_log.alpha == pytest.approx(0.139, abs=0.005)
    (window,) = fit_windows(*noisy(0), window=6, resamples=50)
    assert window.interval is not None
    assert window.log_log.alpha < window.interval[0]


def test_the_slope_of_log_perplexity_depends_on_the_sizes_alone() -> None:
    small, large = (fit_log_line(list(sizes), list(TRUE(sizes))) for sizes in (SIZES, 100 * SIZES))

    assert small.alpha < 4 * large.alpha < 0  # one law, two slopes
    assert small.p_value < 0.01
    assert 0.85 < small.r_squared < 1  # and a straight line that looks well


def test_a_straight_line_of_log_perplexity_is_that_of_least_squares() -> None:
    found = fit_log_line([1.0, np.e, np.e**2], [3.0, 2.0, 1.0])

    assert (found.intercept, found.alpha, found.r_squared) == pytest.approx((3.0, -1.0, 1.0))


def test_a_loss_far_off_moves_the_law_little() -> None:
    sizes = list(np.geomspace(1e6, 1e9, 12))
    losses = list(TRUE(np.array(sizes)))
    losses[5] += 0.5

    assert fit_power_law(sizes, losses).alpha == pytest.approx(TRUE.alpha, abs=0.01)


@pytest.mark.parametrize("seed", range(8))
def test_two_non_negative_coefficients_are_those_of_scipy(seed: int) -> None:
    generator = np.random.default_rng(seed)
    powers, losses = generator.uniform(0.1, 2.0, (3, 7)), generator.normal(0.3, 1.0, 7)
    weights = generator.uniform(0.2, 1.0, (3, 7))

    floors, factors = _non_negative(powers, losses, weights)

    for place in range(3):
        root = np.sqrt(weights[place])
        wanted, _ = nnls(np.stack([root, root * powers[place]], axis=1), root * losses)
        assert [floors[place], factors[place]] == pytest.approx(list(wanted), abs=1e-9)


def test_windows_slide_over_consecutive_sizes_with_all_their_runs() -> None:
    sizes, losses = noisy(1)

    windows = fit_windows(sizes[::-1], losses[::-1], window=4, resamples=20)

    assert [window.sizes for window in windows] == [tuple(SIZES[first : first + 4]) for first in range(3)]
    inside = [place for place, size in enumerate(sizes) if size in windows[1].sizes]
    assert windows[1].law.alpha == fit_power_law([sizes[p] for p in inside], [losses[p] for p in inside]).alpha


def test_as_many_points_as_parameters_have_no_interval() -> None:
    (window,) = fit_windows(list(SIZES[:3]), list(TRUE(SIZES[:3])), window=3)

    assert window.interval is None
    assert window.law.alpha == pytest.approx(TRUE.alpha, abs=1e-3)


def test_the_same_points_give_the_same_interval() -> None:
    first, second = (fit_windows(*noisy(2), window=6, resamples=50)[0].interval for _ in range(2))

    assert first == second


def window(alpha: float, alphas: list[float] | None) -> Window:
    made = None if alphas is None else np.array(alphas)
    return Window((1.0, 2.0, 3.0), PowerLaw(1.0, 1.0, alpha), made, LogLine(0, 0, 0, 0, 0), LogLogLine(1, 1))


@pytest.mark.parametrize(
    ("change", "spread", "verdict"),
    [
        (0.05, 0.02, "IMPROVING"),
        (-0.05, 0.02, "DEGRADING"),
        (0.05, 0.2, "UNDECIDED"),
        (0.005, 0.002, "STABLE"),
        (0.0, 0.005, "STABLE"),
        (0.005, 0.02, "UNDECIDED"),
    ],
)
def test_a_verdict_needs_an_interval_that_excludes_zero(change: float, spread: float, verdict: str) -> None:
    after = [0.3 + change + spread * offset for offset in np.linspace(-1, 1, 41)]

    assert change_of(window(0.3, [0.3] * 41), window(0.3 + change, after)).verdict == verdict


def test_without_resamples_there_is_no_verdict() -> None:
    found = change_of(window(0.3, None), window(0.4, None))

    assert (found.verdict, found.interval) == ("UNDECIDED", None)


def test_a_law_that_changes_is_noticed() -> None:
    """alpha 0.5 up to the third size, and a floor reached at once behind it."""
    sizes = list(np.repeat([1e3, 2e3, 4e3, 8e3, 16e3, 32e3], 3))
    generator = np.random.default_rng(0)
    true = [2.0 + 100 * size**-0.5 if size < 8e3 else 2.0 + 100 * 8e3**-0.5 * (8e3 / size) ** 1.5 for size in sizes]
    losses = [loss + generator.normal(0, 0.003) for loss in true]

    windows = fit_windows(sizes, losses, window=3, resamples=100)

    assert change_of(windows[0], windows[-1]).verdict == "IMPROVING"


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_than_three_sizes_carry_no_fit(count: int) -> None:
    sizes = [100.0 * (place % count + 1) for place in range(6)]

    with pytest.raises(ValueError, match=rf"6 points of {count} sizes carry no fit.*at least 3 distinct sizes"):
        fit_power_law(sizes, [1.0] * 6)


def test_points_that_are_no_points_are_refused() -> None:
    with pytest.raises(ValueError, match="not positive or a loss not finite"):
        fit_power_law([1.0, 2.0, 3.0], [1.0, float("nan"), 2.0])
    with pytest.raises(ValueError, match="window=7: does not fit 6 sizes"):
        fit_windows(list(SIZES), list(TRUE(SIZES)), window=7)
