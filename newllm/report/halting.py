"""`python -m newllm.report.halting <folders>`: loss against mean steps per token of learned halting, beside fixed steps."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from newllm.report.collect import RunCurves
from newllm.report.command import keep, measured_runs, parser_of, readable_runs, refuse_unmeasured, show
from newllm.report.evaluated import evaluation_of, with_measurement
from newllm.report.groups import Group, group_runs
from newllm.report.statistics import Difference, mean_and_deviation, paired_difference
from newllm.report.style import COLOURS, INK, new_figure, styled, tidy
from newllm.report.tables import NONE, Table, number, spread

OWN = ("model.skip_interval", "model.halting", "model.halting_threshold", "loss", "evaluation")
"""Settings in which learned halting and its fixed steps may differ; all others are the same in runs that are compared."""
NOTE = (
    "Mean +- standard deviation over seeds; loss in nats per token. The threshold is a quantile of the text's gates. The difference is to "
    "the line through the losses of fixed steps, at equal mean steps, paired by seed, with its 95 % bootstrap interval. FLOPs of one "
    "forward pass: with learned halting the steps after the one that emits are made too, later tokens read them."
)


@dataclass(frozen=True)
class Point:
    """One rule of when to emit, of one model, over seeds.

    Attributes:
        rule: its name.
        steps: mean steps per emitted token, by seed.
        loss: nats per token, by seed.
        flops: per emitted token, forward.
    """

    rule: str
    steps: Mapping[int, float]
    loss: Mapping[int, float]
    flops: float


@dataclass(frozen=True)
class Frontier:
    """A configuration with learned halting.

    Attributes:
        label: what tells it from the others.
        weighted: by the shares it was trained with.
        points: by threshold; thresholds that change nothing are left out.
        fixed: fixed steps of the same model, by rising steps.
    """

    label: str
    weighted: Point
    points: Sequence[Point]
    fixed: Sequence[Point]

    def above_fixed(self, point: Point) -> Difference | None:
        """Return how much higher a point's loss is than the line of fixed steps at its mean steps; None beyond the line's ends."""
        line = {seed: _on_line(self.fixed, seed, steps) for seed, steps in point.steps.items()}
        return paired_difference(point.loss, {seed: loss for seed, loss in line.items() if loss is not None})


def frontiers_of(runs: Sequence[RunCurves]) -> list[Frontier]:
    """Return every configuration whose halting was measured, each with the fixed steps among the runs."""
    measured = with_measurement(runs, "halting")[0]
    fixed = with_measurement([run for run in runs if _is_fixed(run)], "perplexity")[0]
    return [_frontier(group, fixed) for group in group_runs(measured, "val/loss")]


def halting_table(frontiers: Sequence[Frontier]) -> Table:
    """One row for each rule of each configuration, fixed steps last."""
    rows = [
        [frontier.label, *_cells(point), *_shown(frontier.above_fixed(point))]
        for frontier in frontiers
        for point in (frontier.weighted, *frontier.points)
    ]
    told = {point.rule: point for frontier in frontiers for point in frontier.fixed}
    rows += [["fixed steps", *_cells(point), NONE, NONE] for point in told.values()]
    columns = [
        "configuration",
        "emits",
        "seeds",
        "mean steps",
        "loss",
        "FLOPs per emitted token",
        "above fixed",
        "95 %",
    ]
    return Table("Loss against mean steps per token", columns, rows, NOTE, frozenset((0, 1)))


def draw_halting(frontiers: Sequence[Frontier]) -> Figure:
    """Draw loss against mean steps, a line of thresholds for each configuration and one of fixed steps.

    Args:
        frontiers: at least one.
    """
    with styled():
        figure = new_figure(7.0, 4.6)
        axes = figure.add_subplot()
        tidy(axes, "loss against mean steps per token")
        axes.set_xlabel("mean steps per emitted token")
        axes.set_ylabel("nats per token")
        for place, frontier in enumerate(frontiers):
            colour = COLOURS[place % len(COLOURS)]
            _draw_line(axes, frontier.points, colour, f"thresholds, {frontier.label}", marker="o")
            _draw_line(axes, [frontier.weighted], colour, None, marker="*")
        if frontiers[0].fixed:
            _draw_line(axes, frontiers[0].fixed, INK, "fixed steps", marker="s")
        axes.legend(title="stars: by the shares trained with", title_fontsize=8, alignment="left")
        return figure


def _frontier(group: Group, fixed: Sequence[RunCurves]) -> Frontier:
    runs = group.by_seed
    measured = {seed: evaluation_of(run)["halting"] for seed, run in runs.items()}
    by_seed = {seed: {line["quantile"]: line for line in found["by_threshold"]} for seed, found in measured.items()}
    flops = fmean(group.facts("flops_per_token"))
    points: list[Point] = []
    for quantile in sorted(set.intersection(*map(set, by_seed.values()))):
        lines = {seed: found[quantile] for seed, found in by_seed.items()}
        point = _point(f"gate above {quantile:.0%} of gates", lines, flops)
        if not points or point.steps != points[-1].steps:
            points.append(point)
    weighted = _point("by shares", {seed: found["weighted"] for seed, found in measured.items()}, flops)
    like = _shared_settings(next(iter(runs.values())))
    same = group_runs([run for run in fixed if _shared_settings(run) == like], "val/loss")
    return Frontier(group.label, weighted, points, sorted(map(_fixed_point, same), key=lambda point: point.flops))


def _point(rule: str, lines: Mapping[int, Mapping[str, float]], flops: float) -> Point:
    steps = {seed: line["mean_steps"] for seed, line in lines.items()}
    return Point(rule, steps, {seed: line["loss"] for seed, line in lines.items()}, flops)


def _fixed_point(group: Group) -> Point:
    steps = group.runs[0].settings["model.skip_interval"]
    losses = {seed: evaluation_of(run)["perplexity"]["loss"] for seed, run in group.by_seed.items()}
    return Point(f"at step {steps}", dict.fromkeys(losses, float(steps)), losses, fmean(group.facts("flops_per_token")))


def _is_fixed(run: RunCurves) -> bool:
    return bool(run.settings.get("model.halting") == "fixed")


def _shared_settings(run: RunCurves) -> dict[str, Any]:
    return {
        key: value
        for key, value in run.settings.items()
        if not any(key == own or key.startswith(f"{own}.") for own in OWN)
    }


def _on_line(fixed: Sequence[Point], seed: int, steps: float) -> float | None:
    points = [point for point in fixed if seed in point.loss]
    places, losses = [point.steps[seed] for point in points], [point.loss[seed] for point in points]
    if not places or not places[0] <= steps <= places[-1]:
        return None
    return float(np.interp(steps, places, losses))


def _cells(point: Point) -> list[str]:
    steps, loss = (list(values.values()) for values in (point.steps, point.loss))
    return [point.rule, str(len(loss)), f"{fmean(steps):.3f}", spread(loss), number(point.flops)]


def _shown(found: Difference | None) -> tuple[str, str]:
    if found is None:
        return NONE, NONE
    between = NONE if found.low is None or found.high is None else f"{found.low:+.4f} .. {found.high:+.4f}"
    return f"{found.mean:+.4f}", between


def _draw_line(axes: Axes, points: Sequence[Point], colour: str, label: str | None, *, marker: str) -> None:
    steps = [fmean(point.steps.values()) for point in points]
    means, deviations = zip(*(mean_and_deviation(list(point.loss.values())) for point in points), strict=True)
    spreads = [0.0 if deviation is None else deviation for deviation in deviations]
    axes.errorbar(steps, means, yerr=spreads, color=colour, marker=marker, markersize=5, capsize=2, label=label)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 when table and picture are made, 2 when there is nothing to tell."""
    given = parser_of("halting", __doc__, picture="halting.png").parse_args(arguments)
    runs = readable_runs(given.folders)
    fixed = [run for run in runs if _is_fixed(run)]
    learned = [run for run in runs if not _is_fixed(run)]
    frontiers = frontiers_of([*measured_runs(learned, "halting"), *measured_runs(fixed, "perplexity")])
    if not frontiers:
        refuse_unmeasured(runs, "halting")
    show([halting_table(frontiers)])
    keep(draw_halting(frontiers), given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
