"""How the loss falls with the size of the training text, over the runs beside this one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from newllm.config.fields import Range
from newllm.config.schema import EvaluationConfig
from newllm.evaluation.material import Material
from newllm.report.collect import collect
from newllm.report.scaling import progressions, write_progressions


@dataclass(frozen=True, kw_only=True)
class ScalingConfig(EvaluationConfig):
    """Which sizes are fitted together."""

    across_runs: ClassVar[bool] = True

    window: Annotated[int, Range(minimum=3)]  # consecutive sizes


def measure(material: Material, options: ScalingConfig) -> dict[str, Any]:
    """Return the power laws through the losses that the runs in this run's folder's folder were trained to.

    alpha_progression.json and scaling.png are written beside the runs.

    Args:
        material: one run of the sweep; its own configuration and those of its neighbours tell which runs belong together.
        options: sizes in a window.
    Raises:
        ValueError: fewer than 3 sizes, or sizes that differ in more than their size.
    """
    sweep = material.run.folder.parent
    found = progressions(collect([sweep])[0], window=options.window)
    numbers, picture = write_progressions(found, sweep)
    results: dict[str, Any] = {"numbers": str(numbers), "picture": str(picture)}
    for progression in found:
        told = progression.as_json()
        results[progression.label] = {name: told[name] for name in ("all_sizes", "windows", "changes")}
    return results
