import math
import random

import pytest

from newllm.guards.detectors import SpikeDetector, suspected_leak


def test_spike_is_measured_in_robust_deviations_from_the_median() -> None:
    detector = SpikeDetector(window=5, deviations=3)
    for loss in (4.0, 5.0, 6.0, 7.0, 8.0):  # median 6, median absolute deviation 1
        detector.observe(loss)

    spike = detector.observe(6 + 1.4826 * 4)

    assert spike is not None
    assert spike.median == 6
    assert spike.deviations == pytest.approx(4)


def test_a_loss_within_the_threshold_is_no_spike() -> None:
    detector = SpikeDetector(window=5, deviations=3)
    for loss in (4.0, 5.0, 6.0, 7.0, 8.0):
        detector.observe(loss)

    assert detector.observe(6 + 1.4826 * 2.9) is None
    assert detector.observe(1.0) is None


def test_one_spike_does_not_hide_the_next() -> None:
    detector = SpikeDetector(window=11, deviations=3)
    noise = random.Random(0)
    for _ in range(11):
        detector.observe(5 + noise.gauss(0, 0.1))

    assert detector.observe(50.0) is not None
    assert detector.observe(50.0) is not None


def test_a_falling_loss_has_no_spikes() -> None:
    detector = SpikeDetector(window=20, deviations=3)
    noise = random.Random(0)

    losses = [8 * math.exp(-step / 50) + 2 + noise.uniform(-0.1, 0.1) for step in range(200)]

    assert not [loss for loss in losses if detector.observe(loss) is not None]


def test_a_loss_that_stands_still_has_no_spikes() -> None:
    detector = SpikeDetector(window=5, deviations=3)

    assert not any(detector.observe(2.0 + 1e-6 * (step % 2)) for step in range(50))


def test_a_restored_detector_goes_on_where_it_was() -> None:
    losses = [5.0, 5.1, 4.9, 5.2, 4.8, 5.0, 9.0, 5.0]
    straight, first, second = (SpikeDetector(window=4, deviations=3) for _ in range(3))
    expected = [straight.observe(loss) for loss in losses]

    found = [first.observe(loss) for loss in losses[:5]]
    second.restore(first.losses)
    found += [second.observe(loss) for loss in losses[5:]]

    assert found == expected
    assert second.losses.maxlen == 4


def test_losses_far_below_the_floor_are_a_leak() -> None:
    assert suspected_leak([5.0, 1.0, 0.9, 0.8, 0.7, 0.6], floor_nats=2.0) == 0.8


def test_one_easy_batch_is_no_leak() -> None:
    assert suspected_leak([5.0, 4.9, 0.1, 4.8, 4.7], floor_nats=2.0) is None


def test_losses_a_little_below_the_floor_are_no_leak() -> None:
    """A nano model of bytes was at 2.07 nats after 200 steps on a text with a floor of 2.30."""
    assert suspected_leak([2.07] * 5, floor_nats=2.3) is None
