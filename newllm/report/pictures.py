"""Pictures of many runs: their curves over each other, and what a lower loss costs."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from newllm.report.curves import points, smoothed
from newllm.report.groups import Group
from newllm.report.statistics import mean_and_deviation
from newllm.report.style import COLOURS, FAINT, GRID, INK, new_figure, styled, tidy
from newllm.run_record import HIGHER_IS_BETTER

MOST_POINTS = 300


def draw_overlay(groups: Sequence[Group], metric: str) -> Figure:
    """Draw the metric and the training loss of every run; the first groups in colour, the others grey behind them."""
    with styled():
        figure = new_figure(12.0, 4.6 + 0.1 * min(len(groups), len(COLOURS)))
        for place, name in enumerate((metric, "train/loss")):
            axes = figure.add_subplot(1, 2, place + 1)
            tidy(axes, name)
            axes.set_xlabel("optimizer steps")
            for rank in reversed(range(len(groups))):
                _draw_group(axes, groups[rank], name, rank)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if handles:
            # Below: long names would lie over the curves.
            figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=2)
        return figure


def _draw_group(axes: Axes, group: Group, name: str, rank: int) -> None:
    is_coloured = rank < len(COLOURS)
    colour = COLOURS[rank] if is_coloured else GRID
    label: str | None = f"{group.letter}  {_short(group.label)}" if is_coloured else None
    for run in group.runs:
        steps, values = points(run.lines, name)
        stride = 1 + len(steps) // MOST_POINTS
        values = smoothed(values) if name == "train/loss" else values
        if steps:
            marker = "o" if len(steps) == 1 else ""  # a line through one point is nothing to see
            x, y = steps[::stride], values[::stride]
            axes.plot(x, y, color=colour, linewidth=1.3, alpha=0.85, marker=marker, markersize=3, label=label)
            label = None  # one entry of the legend for all seeds


def _short(label: str, *, most: int = 80) -> str:
    return label if len(label) <= most else f"{label[: most - 3]}..."


def draw_pareto(groups: Sequence[Group], metric: str) -> Figure:
    """Draw the metric against FLOPs per token and against state bytes; a line joins what nothing beats in both."""
    with styled():
        figure = new_figure(12.0, 4.2)
        costs = (("flops_per_token", "FLOPs per token, forward"), ("state_bytes", "state bytes per text"))
        for place, (name, title) in enumerate(costs):
            axes = figure.add_subplot(1, 2, place + 1)
            tidy(axes, f"{metric} against {title}")
            axes.set_xlabel(title)
            _draw_costs(axes, groups, metric, name)
        return figure


def _draw_costs(axes: Axes, groups: Sequence[Group], metric: str, name: str) -> None:
    placed: list[tuple[float, float]] = []
    for rank, group in enumerate(groups):
        values, costs = list(group.values(metric).values()), group.facts(name)
        if not values or not costs:
            continue
        mean, deviation = mean_and_deviation(values)
        cost = sum(costs) / len(costs)
        colour = COLOURS[rank] if rank < len(COLOURS) else FAINT
        axes.errorbar(cost, mean, yerr=deviation, color=colour, marker="o", markersize=5, capsize=2, linewidth=1)
        axes.annotate(group.letter, (cost, mean), xytext=(6, 4), textcoords="offset points", color=INK, fontsize=8)
        placed.append((cost, mean))
    if not placed:
        axes.text(0.5, 0.5, "no finished run", transform=axes.transAxes, ha="center", color=FAINT)
        return
    front = pareto_front(placed, higher_is_better=metric in HIGHER_IS_BETTER)
    axes.step(*zip(*front, strict=True), where="post", color=FAINT, linewidth=0.9, linestyle=":", zorder=1)
    lowest, highest = min(cost for cost, _ in placed), max(cost for cost, _ in placed)
    if highest > 10 * max(lowest, 1):
        # A plain stack keeps a state of no bytes: a logarithmic axis needs a linear beginning for it.
        axes.set_xscale("symlog", linthresh=1.0) if lowest <= 0 else axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def pareto_front(placed: Sequence[tuple[float, float]], *, higher_is_better: bool = False) -> list[tuple[float, float]]:
    """Return the points of which none other costs at most as much and is at least as good, by rising cost."""
    sign = -1.0 if higher_is_better else 1.0
    front: list[tuple[float, float]] = []
    for cost, value in sorted(placed, key=lambda point: (point[0], sign * point[1])):
        if not front or sign * value < sign * front[-1][1]:
            front.append((cost, value))
    return front
