"""What was measured of runs: always of their best weights on validation text, so that figures of several runs stand side by side."""

import json
import shlex
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from newllm.config.compose import compose
from newllm.config.schema import EvaluationConfig, TrainConfig
from newllm.config.typed import build
from newllm.report.collect import RunCurves, Unreadable

COMPARED = {"checkpoint": "best", "split": "validation"}
WITHOUT_EFFECT = ("batch_size", "device")  # on what is measured, but for the last digits


def evaluation_of(run: RunCurves) -> dict[str, Any]:
    """Return what a run's evaluation.json holds; nothing where there is none.

    Raises:
        ValueError: it was measured of other weights or of another split.
    """
    path = run.run.folder / "evaluation.json"
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    own = {name: found.get(name) for name in COMPARED}
    if own != COMPARED:
        told, allowed = (", ".join(f"{name}={of[name]}" for name in COMPARED) for of in (own, COMPARED))
        raise ValueError(f"{path}: was measured with {told}. Allowed: {allowed}, as of the other runs.")
    return found


def with_measurement(runs: Sequence[RunCurves], name: str) -> tuple[list[RunCurves], list[Unreadable]]:
    """Return the finished runs in which something was measured, and those in which it was not, with what to do about them.

    Args:
        runs: those that have not finished are in neither list.
        name: of the measurement.
    Raises:
        ValueError: it was made with different options in runs that differ in their seed only.
    """
    measured: list[RunCurves] = []
    left_out: list[Unreadable] = []
    for run in runs:
        if run.status != "finished":
            continue
        try:
            if name in evaluation_of(run):
                measured.append(run)
                continue
            reason = f"has not been measured with evaluation=[{name}]."
        except ValueError as error:
            reason = str(error)
        left_out.append(Unreadable(run.run.folder, f"{reason} {_what_to_do(run, name)}"))
    _check_options(measured, name)
    return measured, left_out


def _what_to_do(run: RunCurves, name: str) -> str:
    """How a run is measured, or why it cannot be."""
    config, mistakes = build(run.run.config, TrainConfig)
    problems = [] if mistakes else _offered(name).check(config)
    if problems:
        return f"It cannot be: {problems[0].partition(' Allowed')[0]}"
    return f"Run: python evaluate.py {shlex.quote(f'run={run.run.folder}')} 'evaluation=[{name}]'"


@cache
def _offered(name: str) -> EvaluationConfig:
    return compose(["run=.", f"evaluation=[{name}]"], root="evaluate").evaluation[name]


def _check_options(runs: Iterable[RunCurves], name: str) -> None:
    """Refuse to take the mean over seeds of what was measured in different ways."""
    first: dict[str, tuple[RunCurves, dict[str, Any]]] = {}
    for run in runs:
        own = evaluation_of(run).get("made_with", {}).get(name, {})
        other, theirs = first.setdefault(json.dumps(run.settings, sort_keys=True), (run, own))
        differing = [key for key in sorted({*own, *theirs} - {*WITHOUT_EFFECT}) if own.get(key) != theirs.get(key)]
        if differing:
            (key, *_) = differing
            raise ValueError(
                f"{run.run.folder}: evaluation=[{name}] was made with {key}={own.get(key)}, in {other.run.folder}, which differs in its "
                f"seed only, with {key}={theirs.get(key)}. Allowed: the same for all seeds. Run evaluate.py on both with the same options."
            )
