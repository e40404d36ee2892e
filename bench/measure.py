"""Timing that can be compared: alternatives take turns in one process, rounds are kept, a busy machine is refused."""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from newllm import processor
from newllm.whole_file import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
# Relative spread of a row's rounds above which its ratios are not worth writing down.
MAX_SPREAD = 0.35
# Share of all cores that other programs take, above which a measurement begins with a warning.
MAX_BUSY = 0.15
DEVICES = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
DEVICE = DEVICES[0]  # set by `--device` before the benches are imported


class NotWrittenError(Exception):
    """Figures that are not worth keeping; the text says why and what to do."""


@dataclass(frozen=True)
class Found:
    """What a bench gives.

    Attributes:
        text: markdown for docs/benchmarks.md.
        figures: the same for bench/results.
        picture: what stands below the text, and what it shows in words; None if nothing does.
    """

    text: str
    figures: dict[str, Any]
    picture: tuple[str, Figure] | None = None


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


fitted: list[str] = []
"""What was measured so far in this process: it fitted the memory."""


def require_quiet(rows: Sequence[Row], about: str) -> None:
    """Raise where the rounds of any row differ too much.

    Args:
        rows: of one table.
        about: the bench and the size, in words.
    Raises:
        NotWrittenError: they do.
    """
    fitted.append(about)
    loud = [f"{row.name} {row.spread:.0%}" for row in rows if row.spread > MAX_SPREAD]
    if loud:
        raise NotWrittenError(
            f"{about}: rounds spread by {', '.join(loud)} (load {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores). "
            f"Allowed: at most {MAX_SPREAD:.0%}. Nothing was written; measure on a quiet machine."
        )


def describe_load(about: dict[str, object]) -> str:
    """Return how busy the machine was before a bench began, as `machine` tells it."""
    return f"other programs took {about['busy_before']:.0%} of {about['cores']} cores, load {about['load_before']}"


def is_busy(about: dict[str, object]) -> bool:
    """Return whether other programs took too much of the machine before a bench began."""
    return float(str(about["busy_before"])) > MAX_BUSY


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a markdown table."""
    lines = [list(head), ["---"] * len(head), *[list(row) for row in rows]]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine() -> dict[str, object]:
    """Return what the numbers were measured on."""
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else processor.name()
    return {
        "date": date.today().isoformat(),
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        # The load is a mean over the last minute, the bench before this one included: the share tells of others alone.
        "busy_before": round(psutil.cpu_percent(interval=1) / 100, 2),
        "load_before": round(os.getloadavg()[0], 2),
    }


def file_name(about: dict[str, object]) -> str:
    """Return what files of that machine are called, without an ending."""
    return re.sub(r"[^a-z0-9]+", "_", f"{about['device']}_{about['cores']}_cores".lower())


def write(name: str, about: dict[str, object], found: Found) -> None:
    """Put what one bench found beside the others of this machine."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{file_name(about)}.json"
    entry: dict[str, Any] = {"machine": about, "text": found.text.split("\n"), **found.figures}
    if found.picture is not None:
        from newllm.report.style import save_png  # matplotlib, which measuring needs not

        caption, figure = found.picture
        picture = f"bench_{name}_{file_name(about)}.png"
        save_png(figure, DOCS / picture, dots_per_inch=110)
        entry["picture"] = {"caption": caption, "file": picture}
    others = json.loads(path.read_text()) if path.exists() else {}
    write_whole(path, json.dumps({**others, name: entry}, indent=2, sort_keys=True) + "\n")
