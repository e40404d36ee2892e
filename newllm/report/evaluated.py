"""What was measured of runs: always of their best weights on validation text, so that figures of several runs stand side by side."""

import json
from collections.abc import Sequence
from typing import Any

from newllm.report.collect import RunCurves, Unreadable

COMPARED = {"checkpoint": "best", "split": "validation"}


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
    """
    measured: list[RunCurves] = []
    left_out: list[Unreadable] = []
    for run in runs:
        if run.status != "finished":
            continue
        folder = run.run.folder
        repair = f"Run: python evaluate.py run={folder} evaluation=[{name}]"
        try:
            if name in evaluation_of(run):
                measured.append(run)
            else:
                left_out.append(Unreadable(folder, f"has not been measured with evaluation=[{name}]. {repair}"))
        except ValueError as error:
            left_out.append(Unreadable(folder, f"{error} {repair}"))
    return measured, left_out
