"""Finding runs: every run folder below the given ones, and what could not be read."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from newllm.config.typed import flat, is_run_independent
from newllm.run_record import Metrics, Run, read_metrics, read_run

# What a run writes from its first second on: a folder that has one of these without the others was damaged.
SIGNS = frozenset(("run.json", "config.yaml", "metrics.jsonl"))
VERDICT = frozenset(("name", "status", "message"))
# What a report reads of run.json, where it is there.
FACTS: dict[str, type | tuple[type, ...]] = {
    "seed": int,
    "status": str,
    "guards": list,
    "overrides": list,
    "metrics": dict,
    "best_metrics": dict,
    **dict.fromkeys(("parameters", "flops_per_token", "state_bytes", "tokens"), (int, float, dict)),
    "tokens_per_second": (int, float),
    "wall_seconds": (int, float, NoneType),
}


@dataclass(frozen=True)
class RunCurves:
    """A run and its log steps.

    Attributes:
        run: facts and configuration.
        lines: log steps of metrics.jsonl.
        settings: leaves of the configuration that decide what is computed, by dotted key, without the seed.
    """

    run: Run
    lines: Sequence[Metrics]
    settings: dict[str, Any]

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.run.facts["seed"]

    @property
    def status(self) -> str:
        """finished, stopped, failed or running (which may mean killed)."""
        return self.run.facts["status"]

    def last(self, name: str) -> float | None:
        """Return the last logged value of a metric; None where it never was."""
        value = next((line[name] for line in reversed(self.lines) if name in line), None)
        return self.run.facts.get("metrics", {}).get(name, value)

    def best(self, name: str) -> float | None:
        """Return the best value that run.json holds for a metric; None before the run's end."""
        return self.run.facts.get("best_metrics", {}).get(name)


@dataclass(frozen=True)
class Unreadable:
    """A folder that looks like a run and cannot be read, and why."""

    folder: Path
    reason: str


def run_folders(folder: Path) -> Iterator[Path]:
    """Yield the run folders at or below a folder, sorted; hidden folders are left alone."""
    for place, subfolders, files in os.walk(folder):
        if SIGNS & set(files):
            subfolders.clear()
            yield Path(place)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))


def collect(folders: Iterable[Path]) -> tuple[list[RunCurves], list[Unreadable]]:
    """Read all runs at or below the given folders, each once; what cannot be read is returned with its reason."""
    runs: list[RunCurves] = []
    unreadable: list[Unreadable] = []
    seen: set[Path] = set()
    for folder in folders:
        found = list(run_folders(folder))
        if not found:
            unreadable.append(Unreadable(folder, "holds no run" if folder.is_dir() else "is no folder"))
        for place in found:
            if place.resolve() in seen:
                continue
            seen.add(place.resolve())
            try:
                runs.append(_read(place))
            except ValueError as error:
                unreadable.append(Unreadable(place, str(error)))
    return runs, unreadable


def _read(folder: Path) -> RunCurves:
    run = read_run(folder)
    strange = [name for name, kind in FACTS.items() if name in run.facts and not isinstance(run.facts[name], kind)]
    strange += [name for name in ("seed", "status") if name not in run.facts]
    verdicts = [] if "guards" in strange else run.facts.get("guards", [])
    if not all(isinstance(verdict, dict) and verdict.keys() >= VERDICT for verdict in verdicts):
        strange.append("guards")
    if strange:
        raise ValueError(
            f"{folder / 'run.json'}: was written by another version ({', '.join(strange)} missing or of another form). "
            "Allowed: what this version's train.py wrote. Train again, or report with the version of the run."
        )
    settings = {key: value for key, value in flat(run.config).items() if not is_run_independent(key)}
    for key in ("name", "seed"):
        settings.pop(key, None)
    if settings.get("data.path") is not None:  # a file may change between two runs; what is drawn differs by the seed
        settings["data_fingerprint"] = str(run.facts.get("data_fingerprint"))[:12]
    return RunCurves(run, read_metrics(folder), settings)
