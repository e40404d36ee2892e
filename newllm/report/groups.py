"""Runs that differ only in their seed form a group; groups are told apart by the settings in which they differ."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from string import ascii_uppercase
from typing import Any

from newllm.report.collect import RunCurves
from newllm.run_record import HIGHER_IS_BETTER


@dataclass(frozen=True)
class Group:
    """Runs of one configuration.

    Attributes:
        letter: short name, the same in tables and pictures.
        label: the fewest settings that tell it from the other groups.
        settings: its values of all settings in which the groups differ; a setting it does not have is missing.
        runs: all its runs.
    """

    letter: str
    label: str
    settings: dict[str, Any]
    runs: Sequence[RunCurves]

    @property
    def num_finished(self) -> int:
        """Finished runs, several with one seed included."""
        return sum(run.status == "finished" for run in self.runs)

    @property
    def by_seed(self) -> dict[int, RunCurves]:
        """Finished runs by seed; of several with one seed the one that started last."""
        finished = [run for run in self.runs if run.status == "finished"]
        return {run.seed: run for run in sorted(finished, key=lambda run: str(run.run.facts.get("started")))}

    def values(self, metric: str) -> dict[int, float]:
        """Return the last value of a metric of every finished run, by seed."""
        found = {seed: run.last(metric) for seed, run in self.by_seed.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def facts(self, name: str) -> list[float]:
        """Return a number of run.json for every finished run that has it."""
        found = [total(run.run.facts.get(name)) for run in self.by_seed.values()]
        return [value for value in found if value is not None]


def total(fact: Any) -> float | None:
    """Return a fact as one number: of parameter counts the total."""
    return fact.get("total") if isinstance(fact, dict) else fact


def text(value: Any) -> str:
    """Return a setting as the command line would take it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def stack_name(settings: dict[str, Any]) -> str:
    """Return a run's kinds of layers from the bottom, each once."""
    stack = settings.get("layers.stack", ())
    kinds = [next(iter(layer)) if isinstance(layer, dict) else str(layer) for layer in stack]
    return " + ".join(dict.fromkeys(kinds)) or str(settings.get("model.kind"))


def memory_kernel(settings: dict[str, Any]) -> str | None:
    """Return the kernel of a run's memory; None of stacks that have none."""
    return None if stack_name(settings) == "pythia" else settings.get("layers.memory_kernel")


def memory_name(settings: dict[str, Any]) -> str:
    """Return in words what a run remembers with: its kinds of layers and, with a memory, its kernel."""
    kernel = memory_kernel(settings)
    return stack_name(settings) if kernel is None else f"{stack_name(settings)}, {kernel}"


def _letter(number: int) -> str:
    letters = ""
    while number >= 0:
        number, rest = divmod(number, 26)
        letters, number = ascii_uppercase[rest] + letters, number - 1
    return letters


def _differing(bundles: Sequence[Sequence[RunCurves]]) -> list[str]:
    """Keys whose value is not the same in all bundles; kinds first, then what users typed, then the rest."""
    keys = list(dict.fromkeys(key for bundle in bundles for key in bundle[0].settings))
    found = [key for key in keys if len({text(bundle[0].settings.get(key, "")) for bundle in bundles}) > 1]
    typed = {
        override.lstrip("+").split("=")[0]
        for bundle in bundles
        for override in bundle[0].run.facts.get("overrides", [])
    }
    return sorted(found, key=lambda key: (not key.endswith(".kind"), key not in typed, keys.index(key)))


def _telling(bundles: Sequence[Sequence[RunCurves]], keys: Sequence[str]) -> list[str]:
    """Keys, taken in order while each splits bundles that those before it leave together."""
    chosen: list[str] = []
    for key in keys:
        with_key = [*chosen, key]
        parts = [
            {tuple(text(bundle[0].settings.get(name, "")) for name in names) for bundle in bundles}
            for names in (chosen, with_key)
        ]
        if len(parts[1]) > len(parts[0]):
            chosen = with_key
    return chosen


def group_runs(runs: Sequence[RunCurves], metric: str) -> list[Group]:
    """Return the groups, the best mean of the metric first, those without a finished run last."""
    bundles: dict[str, list[RunCurves]] = {}
    for run in runs:
        bundles.setdefault(json.dumps(run.settings, sort_keys=True), []).append(run)
    parts = list(bundles.values())
    keys = _differing(parts)
    telling = _telling(parts, keys)
    groups = []
    for part in parts:
        settings = part[0].settings
        # "model=infini", not "model.kind=infini": as it is typed.
        told = [
            f"{key.removesuffix('.kind')}={text(settings[key])}" if key in settings else f"no {key}" for key in telling
        ]
        shown = {key: settings[key] for key in keys if key in settings}
        groups.append(Group("", " ".join(told) or "all runs", shown, part))

    def rank(group: Group) -> tuple[bool, float]:
        values = group.values(metric)
        sign = -1.0 if metric in HIGHER_IS_BETTER else 1.0
        return (False, sign * fmean(values.values())) if values else (True, 0.0)

    ordered = sorted(groups, key=rank)
    return [Group(_letter(place), group.label, group.settings, group.runs) for place, group in enumerate(ordered)]
