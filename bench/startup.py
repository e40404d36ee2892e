"""Seconds from a command to its answer: --help, a refusal, and the first training step of the nano model."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.measure import Found, Row, require_quiet, table

ROOT = Path(__file__).parent.parent


def seconds_of(arguments: list[str]) -> float:
    """Return the seconds of a command until it ends."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, check=False)
    return time.perf_counter() - started


def first_step_seconds(arguments: list[str]) -> float:
    """Return the seconds until the line of the first optimizer step is in metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", *arguments, f"output_dir={folder}", "trainer.log_every_steps=1"]
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not list(Path(folder).rglob("metrics.jsonl")):
                if process.poll() is not None:
                    raise RuntimeError(f"{' '.join(command)} ended with {process.returncode} before its first step")
                time.sleep(0.02)
            return time.perf_counter() - started
        finally:
            process.kill()
            process.wait()


def run(quick: bool) -> Found:
    """Measure each three times; the first warms the disk and does not count."""
    rounds = 1 if quick else 3
    told = {
        "python train.py --help": (lambda: seconds_of(["--help"]), 2),
        "python train.py model.dim=abc (refused)": (lambda: seconds_of(["model.dim=abc"]), 2),
        "python train.py, first step": (lambda: first_step_seconds([]), 20),
        "python train.py experiment=first_run, first step": (lambda: first_step_seconds(["experiment=first_run"]), 20),
    }
    lines, figures = [], {}
    for name, (call, goal) in told.items():
        first, *seconds = [call() for _ in range(rounds + (not quick))] if not quick else [0.0, call()]
        if not quick:
            require_quiet([Row(name, seconds, first)], "startup")
        figures[name] = {"first_seconds": first, "seconds": seconds, "goal_seconds": goal}
        lines.append([f"`{name}`", f"{statistics.median(seconds):.1f} s", f"< {goal} s"])
        print(*lines[-1], sep=" | ", flush=True)
    return Found(f"{table(['command', 'median', 'goal'], lines)}\n\nWarm disk, tokenised text in the cache.", figures)
