"""`python -m newllm.report.recall <folders>`: the picture of a sweep over sizes of state, accuracy against state bytes."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from newllm.report.collect import RunCurves, collect
from newllm.report.groups import Group, group_runs, memory_name
from newllm.report.statistics import mean_and_deviation
from newllm.report.style import COLOURS, FAINT, new_figure, save_png, styled, tidy

METRIC = "val/accuracy"


def series_of(groups: Sequence[Group]) -> dict[str, list[tuple[float, float, float | None]]]:
    """Return of each kind of memory the points (mean state bytes, mean accuracy, deviation over seeds), by rising bytes.

    Of several configurations with the same bytes, such as learning rates, the most accurate counts.
    """
    found: dict[str, dict[float, tuple[float, float, float | None]]] = {}
    for group in groups:
        values, costs = list(group.values(METRIC).values()), group.facts("state_bytes")
        if not values or not costs:
            continue
        mean, deviation = mean_and_deviation(values)
        points, cost = found.setdefault(memory_name(group.runs[0].settings), {}), fmean(costs)
        if cost not in points or mean > points[cost][1]:
            points[cost] = (cost, mean, deviation)
    return {name: [points[cost] for cost in sorted(points)] for name, points in sorted(found.items())}


def draw_state_vs_recall(runs: Sequence[RunCurves]) -> Figure:
    """Draw accuracy against state bytes, one line for each kind of memory; what guessing reaches is dotted.

    Args:
        runs: of recall probes; unfinished ones are left out.
    Raises:
        ValueError: none has finished with an accuracy.
    """
    series = series_of(group_runs(runs, METRIC))
    if not series:
        raise ValueError(
            f"report: none of {len(runs)} runs has finished with {METRIC}. Allowed: at least one. Wait or train again."
        )
    with styled():
        figure = new_figure(7.0, 4.6)
        axes = figure.add_subplot()
        tidy(axes, "recall against bytes of state")
        for place, (name, points) in enumerate(series.items()):
            costs, means, deviations = zip(*points, strict=True)
            spread = [0.0 if deviation is None else deviation for deviation in deviations]
            colour = COLOURS[place % len(COLOURS)]
            axes.errorbar(costs, means, yerr=spread, color=colour, marker="o", markersize=5, capsize=2, label=name)
        for chance in sorted({run.run.facts.get("data", {}).get("chance_accuracy") for run in runs} - {None}):
            axes.axhline(chance, color=FAINT, linewidth=0.9, linestyle=":", label=f"chance {chance:.2g}")
        # A layer without a state takes no bytes: a logarithmic axis needs a linear beginning for it.
        axes.set_xscale("symlog", base=2, linthresh=1.0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("state bytes per text after a row")
        axes.set_ylabel(f"{METRIC}, share of targets")
        axes.set_ylim(-0.02, 1.02)
        axes.legend()
        return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 when the picture is written, 2 when there is nothing to draw."""
    parser = argparse.ArgumentParser(prog="python -m newllm.report.recall", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders of recall probes, or folders that hold them")
    parser.add_argument("--output", type=Path, help="picture to write (state_vs_recall.png in the first folder)")
    given = parser.parse_args(arguments)
    runs, unreadable = collect(given.folders)
    for item in unreadable:
        print(f"not readable: {item.folder}: {item.reason}", file=sys.stderr)
    try:
        figure = draw_state_vs_recall(runs)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    path = given.output or given.folders[0] / "state_vs_recall.png"
    save_png(figure, path)
    print(f"picture: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
