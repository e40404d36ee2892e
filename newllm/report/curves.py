"""curves.png: how one run went, from its metrics.jsonl."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from newllm.report.style import COLOURS, FAINT, new_figure, save_png, styled, tidy
from newllm.run_record import Metrics, read_metrics

Points = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Panel:
    """One small picture: metric names with their labels, drawn where the run has any of them."""

    title: str
    names: Mapping[str, str]
    is_log: bool = False


LOSS = Panel(
    "loss (nats per token)",
    {
        "train/loss": "training",
        "val/loss": "validation",
        "val/loss_lagged": "validation, one lagged sweep",
        "val/loss_no_feedback": "validation, feedback off",
    },
)
PANELS = (
    Panel(
        "lag of the cached states",
        {
            "lag/relative_error": "relative error",
            "lag/contraction": "contraction",
            "lag/gradient_cosine": "gradient cosine",
        },
    ),
    Panel("lag: sweeps to tolerance", {"lag/sweeps_to_tolerance": "sweeps"}),
    Panel("memory: mean gate", {"memory/gate_mean": "gate"}),
    Panel("memory: norm of a read", {"memory/read_norm": "norm"}),
    Panel("context: effective rank", {"context/effective_rank": "rank"}),
    Panel("context: converged share", {"context/converged_share": "share"}),
    Panel(
        "context: losses",
        {"context/fixed_point_loss": "fixed point", "context/diversity_loss": "diversity"},
    ),
    Panel("steps of an emitted token", {"val/mean_steps": "by threshold", "val/mean_steps_weighted": "by shares"}),
    Panel("cosine of last cycles' and whole gradient", {"trm/gradient_cosine": "cosine"}),
    Panel("tokens per second", {"speed/tokens_per_second": "tokens/s"}),
    Panel("share of the device's peak speed", {"speed/mfu": "share"}),
    Panel("time waiting for data (share)", {"speed/data_wait_share": "share"}),
    Panel("gradient norm", {"optim/grad_norm": "norm"}, is_log=True),
    Panel("learning rate", {"optim/lr": "rate"}),
)


def points(lines: Sequence[Metrics], name: str) -> Points:
    """Return steps and values of one metric, without values that are not finite."""
    found = [(line["step"], line[name]) for line in lines if math.isfinite(line.get(name, math.nan))]
    return [step for step, _ in found], [value for _, value in found]


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the mean over a thirtieth of the run around each point; narrower at both ends, so nothing is shifted."""
    half = len(values) // 60
    reach = [min(half, place, len(values) - 1 - place) for place in range(len(values))]
    return [fmean(values[place - r : place + r + 1]) for place, r in enumerate(reach)]


def draw_curves(folder: str | Path) -> Path:
    """Draw the curves of a run into its folder as curves.png, and return where that is."""
    lines, path = read_metrics(folder), Path(folder) / "curves.png"
    with styled():
        save_png(_figure(lines), path)
    return path


def _figure(lines: Sequence[Metrics]) -> Figure:
    small = [panel for panel in PANELS if any(points(lines, name)[0] for name in panel.names)]
    last_step = max((line["step"] for line in lines), default=1)
    rows = max(2, math.ceil(len(small) / 2))
    figure = new_figure(12.0, max(4.4, 1.7 * rows))
    grid = figure.add_gridspec(rows, 4)
    _draw_loss(figure.add_subplot(grid[:, :2]), lines)
    for number, panel in enumerate(small):
        axes = figure.add_subplot(grid[number // 2, 2 + number % 2])
        _draw_small(axes, panel, lines)
        if number >= len(small) - 2:
            axes.set_xlabel("optimizer steps")
    for axes in figure.axes:
        axes.set_xlim(0, last_step * 1.02)
    return figure


def _draw_loss(axes: Axes, lines: Sequence[Metrics]) -> None:
    tidy(axes, LOSS.title)
    axes.set_xlabel("optimizer steps")
    drawn = False
    for (name, label), colour in zip(LOSS.names.items(), (FAINT, *COLOURS), strict=False):
        steps, values = points(lines, name)
        if not steps:
            continue
        drawn = True
        told = f"{label}  {values[-1]:.3f}"
        if name == "train/loss" and len(values) >= 60:
            axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35)
            axes.plot(
                steps, smoothed(values), color=colour, linewidth=1.5, label=f"{label}  {smoothed(values)[-1]:.3f}"
            )
        else:
            marker = "o" if len(values) <= 60 else ""
            axes.plot(steps, values, color=colour, linewidth=1.7, marker=marker, markersize=3, label=told)
    if drawn:
        axes.legend(title="last value", title_fontsize=8, alignment="left")
    else:
        axes.text(0.5, 0.5, "nothing was logged", transform=axes.transAxes, ha="center", color=FAINT)


def _draw_small(axes: Axes, panel: Panel, lines: Sequence[Metrics]) -> None:
    is_log = panel.is_log and all(value > 0 for name in panel.names for value in points(lines, name)[1])
    if is_log:
        axes.set_yscale("log")  # before the ticks are formatted
    tidy(axes, panel.title)
    for (name, label), colour in zip(panel.names.items(), COLOURS, strict=False):
        steps, values = points(lines, name)
        if steps:
            marker = "o" if len(values) <= 30 else ""
            axes.plot(steps, values, color=colour, linewidth=1.4, marker=marker, markersize=2.5, label=label)
    drawn = axes.get_legend_handles_labels()[1]
    if not is_log:
        low, high = axes.get_ylim()
        low, high = min(0.0, low), high + 0.05 * abs(high)
        # The legend stands above the curves, in a third of the height that they leave to it.
        axes.set_ylim(low, high + (0.5 * (high - low) if len(drawn) > 1 else 0.0))
    if len(drawn) > 1:
        axes.legend(loc="upper left", ncols=2, borderaxespad=0.1, columnspacing=1.2, handlelength=1.2, labelspacing=0.2)
