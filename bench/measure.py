"""Timing that can be compared: alternatives take turns in one process, rounds are kept, a busy machine is refused."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
# Relative spread of a row's rounds above which its ratios are not worth writing down.
MAX_SPREAD = 0.35
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class NotWrittenError(Exception):
    """Figures that are not worth keeping; the text says why and what to do."""


@dataclass(frozen=True)
class Found:
    """What a bench gives: markdown for docs/benchmarks.md, and the same figures for bench/results."""

    text: str
    figures: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """Seconds per call of one alternative, a number per round; the calls before them are not among these."""

    name: str
    seconds: list[float]
    warmup_seconds: float

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

    def figures(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "warmup_seconds": self.warmup_seconds}


def take_turns(
    alternatives: dict[str, Callable[[], object]], *, rounds: int, min_seconds: float = 0.2, warmups: int = 2
) -> list[Row]:
    """Return the seconds per call of each alternative; in every round each runs once, one after another.

    The first calls of each are not counted. A call shorter than `min_seconds` is repeated until they add up to it.
    """
    repeats, warmup = {}, {}
    for name, call in alternatives.items():
        begun = time.perf_counter()
        for _ in range(warmups):
            started = time.perf_counter()
            timed(call)
        warmup[name] = time.perf_counter() - begun
        repeats[name] = max(1, round(min_seconds / max(time.perf_counter() - started, 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, call in alternatives.items():
            seconds[name].append(timed(call, repeats[name]) / repeats[name])
    return [Row(name, values, warmup[name]) for name, values in seconds.items()]


def timed(call: Callable[[], object], repeats: int = 1) -> float:
    """Return the seconds of so many calls, all work of the device included."""
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most bytes of tensors that a call holds at once beyond those before it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    found = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in found if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def paired_ratio(above: Row, below: Row) -> float:
    """Return the median over rounds of seconds over seconds, unitless."""
    return statistics.median(a / b for a, b in zip(above.seconds, below.seconds, strict=True))


def require_quiet(rows: Sequence[Row], about: str) -> None:
    """Raise where the rounds of any row differ too much.

    Raises:
        NotWrittenError: they do.
    """
    loud = [f"{row.name} {row.spread:.0%}" for row in rows if row.spread > MAX_SPREAD]
    if loud:
        raise NotWrittenError(
            f"{about}: rounds spread by {', '.join(loud)} (load {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores). "
            f"Allowed: at most {MAX_SPREAD:.0%}. Nothing was written; measure on a quiet machine."
        )


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a markdown table."""
    lines = [list(head), ["---"] * len(head), *[list(row) for row in rows]]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine() -> dict[str, object]:
    """Return what the numbers were measured on."""
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_before": round(os.getloadavg()[0], 2),
    }


def write(name: str, about: dict[str, object], figures: dict[str, Any]) -> Path:
    """Put the figures of one bench beside the others of this machine and return the file."""
    RESULTS.mkdir(exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "_", f"{about['device']}_{about['cores']}_cores".lower())
    path = RESULTS / f"{slug}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**found, name: {"machine": about, **figures}}, indent=2, sort_keys=True) + "\n")
    return path
