"""Timing that can be compared: alternatives take turns in one process, rounds are kept, a busy machine is refused."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
# Relative spread of a row's rounds above which its ratios are not worth writing down.
MAX_SPREAD = 0.35


@dataclass(frozen=True)
class Row:
    """Seconds per call of one alternative, a number per round."""

    name: str
    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the range between the quartiles, over the median; unitless."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def take_turns(alternatives: dict[str, Callable[[], object]], *, rounds: int, min_seconds: float = 0.2) -> list[Row]:
    """Return the seconds per call of each alternative; in every round each runs once, one after another.

    The first call of each is not counted. A call shorter than `min_seconds` is repeated until they add up to it.
    """
    repeats = {}
    for name, call in alternatives.items():
        call()
        started = time.perf_counter()
        call()
        repeats[name] = max(1, round(min_seconds / max(time.perf_counter() - started, 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, call in alternatives.items():
            started = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            seconds[name].append((time.perf_counter() - started) / repeats[name])
    return [Row(name, values) for name, values in seconds.items()]


def paired_ratio(slow: Row, fast: Row) -> float:
    """Return the median over rounds of slow over fast, unitless."""
    return statistics.median(s / f for s, f in zip(slow.seconds, fast.seconds, strict=True))


def machine() -> dict[str, object]:
    """Return what the numbers were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_before": round(os.getloadavg()[0], 2),
    }


def write(name: str, found: dict[str, object]) -> Path:
    """Write a result file and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(found, indent=2) + "\n")
    return path
