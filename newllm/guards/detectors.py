"""What a loss curve cannot do, found from its numbers alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

NORMAL_SHARE = 1.4826  # standard deviation over median absolute deviation of normal noise
# Nats; a loss that hardly moves has no deviation of its own, and its rounding would be a spike.
SMALLEST_DEVIATION = 1e-3
# A model of bytes may come below what pairs of bytes tell within some hundred steps; a leak ends near zero.
LEAK_SHARE = 0.7
LEAK_WINDOW = 5  # optimizer steps: one easy batch is no leak


@dataclass(frozen=True)
class Spike:
    """A loss far above those before it.

    Attributes:
        median: running median, nats.
        deviations: distance from it in robust deviations.
    """

    median: float
    deviations: float


class SpikeDetector:
    """Compares every loss with the median of those before it; silent until half the window is filled.

    Args:
        window: optimizer steps in the median.
        deviations: robust deviations (of the median absolute deviation) above the median that make a spike.
    """

    def __init__(self, window: int, deviations: float) -> None:
        self.deviations = deviations
        self.losses: deque[float] = deque(maxlen=window)

    @property
    def middle(self) -> float:
        """Median of the losses in the window."""
        return median(self.losses)

    def observe(self, loss: float) -> Spike | None:
        """Take the next finite loss, nats; return the spike it is, if it is one."""
        spike = self._judge(loss)
        self.losses.append(loss)
        return spike

    def restore(self, losses: Iterable[float]) -> None:
        """Go on after these losses, the last ones of the run so far."""
        self.losses = deque(losses, maxlen=self.losses.maxlen)

    def _judge(self, loss: float) -> Spike | None:
        if 2 * len(self.losses) < (self.losses.maxlen or 0):
            return None
        middle = self.middle
        deviation = max(NORMAL_SHARE * median(abs(past - middle) for past in self.losses), SMALLEST_DEVIATION)
        distance = (loss - middle) / deviation
        return Spike(middle, distance) if distance > self.deviations else None


def suspected_leak(losses: Iterable[float], floor_nats: float) -> float | None:
    """Return the median of the last losses if no fresh model can have reached it, None otherwise.

    Args:
        losses: training losses in order, nats.
        floor_nats: entropy of the text given the token before.
    """
    last = list(losses)[-LEAK_WINDOW:]
    if len(last) < LEAK_WINDOW or median(last) >= LEAK_SHARE * floor_nats:
        return None
    return median(last)
