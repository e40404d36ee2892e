"""`python -m newllm.report.contexts <folders>`: loss, norm of the contexts and norm of the gradient of many runs in one picture, and
whether the norm grows before a loss spikes.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from newllm.guards.detectors import SpikeDetector
from newllm.report.collect import RunCurves
from newllm.report.command import keep, parser_of, readable_runs, refuse, show
from newllm.report.curves import points
from newllm.report.groups import Group, group_runs
from newllm.report.statistics import mean_and_deviation
from newllm.report.style import COLOURS, FAINT, new_figure, styled, tidy
from newllm.report.tables import NONE, Table, number, spread

METRIC = "val/loss"
LEAD_STEPS = 10  # optimizer steps before a spike in which a norm is looked at
RUN_UP_STEPS = 5  # the same before an excursion of the first steps, where there are not ten before it
EXCURSION = 1.1  # times the first loss: a training loss does not come back there by chance
PANELS = (
    ("validation loss (nats per token)", METRIC, False),
    ("training loss (nats per token)", "train/loss", True),
    ("norm of contexts, mean over positions", "context/norm_mean", True),
    ("gradient norm, before clipping", "optim/grad_norm", True),
)


@dataclass(frozen=True)
class Lead:
    """What a norm did before the spikes of a loss.

    Attributes:
        spikes: losses far above the running median, with enough steps before them.
        grew: spikes before which the norm had grown over LEAD_STEPS.
        ranks: of each spike, the share of all stretches of LEAD_STEPS in its run in which the norm grew less: near 0.5 on average
            where spikes and growth have nothing to do with each other.
    """

    spikes: int
    grew: int
    ranks: tuple[float, ...]

    def __add__(self, other: "Lead") -> "Lead":
        return Lead(self.spikes + other.spikes, self.grew + other.grew, self.ranks + other.ranks)


def spike_steps(run: RunCurves) -> list[int]:
    """Return the steps whose training loss is a spike by the rule of the run's own guard; of neighbouring ones the first."""
    detector = SpikeDetector(run.settings["guards.spike_window"], run.settings["guards.spike_deviations"])
    found: list[int] = []
    for step, loss in zip(*points(run.lines, "train/loss"), strict=True):
        if detector.observe(loss) is not None and (not found or step - found[-1] > LEAD_STEPS):
            found.append(int(step))
    return found


def lead(run: RunCurves, name: str) -> Lead:
    """Return what the metric did in the steps before each spike of a run; needs a line for every step."""
    steps, values = points(run.lines, name)
    logs = {int(step): float(np.log(value)) for step, value in zip(steps, values, strict=True) if value > 0}
    # Up to the step before: what the spike's own step shows comes too late to be a sign of it.
    ends = [step for step in logs if {step - 1, step - 1 - LEAD_STEPS} <= logs.keys()]
    growth = {step: logs[step - 1] - logs[step - 1 - LEAD_STEPS] for step in ends}
    told = [growth[step] for step in spike_steps(run) if step in growth]
    every = np.array(list(growth.values()))
    ranks = tuple(float(np.mean(every < value)) for value in told)
    return Lead(len(told), sum(value > 0 for value in told), ranks)


@dataclass(frozen=True)
class Excursion:
    """The highest training loss of a run, where it lies above the first one; the first steps have no running median to tell spikes by.

    Attributes:
        step: optimizer step.
        height: the loss over the first one.
        growth: norm of the contexts at the step before, over that RUN_UP_STEPS earlier; None without contexts.
    """

    step: int
    height: float
    growth: float | None


def excursion(run: RunCurves) -> Excursion | None:
    """Return the highest training loss of a run and how the norm of its contexts came to it; None if none is above the first."""
    steps, losses = points(run.lines, "train/loss")
    norms = dict(zip(*points(run.lines, "context/norm_mean"), strict=True))
    highest = int(np.argmax(losses)) if losses else 0
    if not losses or losses[highest] <= EXCURSION * losses[0]:
        return None
    step = steps[highest]
    before, earlier = norms.get(step - 1), norms.get(max(steps[0], step - 1 - RUN_UP_STEPS))
    growth = before / earlier if before is not None and earlier else None
    return Excursion(int(step), losses[highest] / losses[0], growth)


def draw_contexts(groups: Sequence[Group]) -> Figure:
    """Draw loss, context norm and gradient norm of every run over its steps, a colour for each configuration.

    A configuration without a context has no line in the panel of norms.
    """
    with styled():
        figure = new_figure(12.0, 7.6)
        for place, (title, name, is_log) in enumerate(PANELS):
            axes = figure.add_subplot(2, 2, place + 1)
            tidy(axes, title)
            for rank in reversed(range(len(groups))):
                _draw_group(axes, groups[rank], name, COLOURS[rank] if rank < len(COLOURS) else FAINT)
            if is_log:
                axes.set_yscale("log")
                tidy(axes, title)
            if place >= 2:
                axes.set_xlabel("optimizer steps")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.axes[0].legend(handles[::-1], labels[::-1])
        return figure


def _draw_group(axes: Axes, group: Group, name: str, colour: str) -> None:
    label: str | None = group.label
    for run in group.runs:
        steps, values = points(run.lines, name)
        is_every_step = len(steps) > 60
        if steps:
            axes.plot(steps, values, color=colour, linewidth=0.7 if is_every_step else 1.3, alpha=0.8, label=label)
            label = None  # one entry of the legend for all seeds
        if name == "train/loss" and is_every_step:
            values_at = dict(zip(steps, values, strict=True))
            spikes = spike_steps(run)
            axes.plot(spikes, [values_at[step] for step in spikes], "v", color=colour, markersize=4)


def norm_table(groups: Sequence[Group]) -> Table:
    """One row per configuration: loss, norm of its contexts, spikes, and what the norms did before them."""
    rows = []
    for group in groups:
        finished = list(group.by_seed.values())
        norms = [run.last("context/norm_mean") for run in finished]
        peaks = [max(points(run.lines, "context/norm_max")[1], default=None) for run in finished]
        spikes = [len(spike_steps(run)) for run in finished]
        rows.append(
            [
                group.letter,
                group.label,
                spread(list(group.values(METRIC).values())),
                spread([norm for norm in norms if norm is not None]),
                number(max((peak for peak in peaks if peak is not None), default=None)),
                "/".join(map(str, spikes)),
                *(_told([lead(run, name) for run in finished]) for name in ("context/norm_mean", "optim/grad_norm")),
                _excursions([found for run in finished if (found := excursion(run)) is not None]),
            ]
        )
    columns = ["", "configuration", METRIC, "norm, last", "norm, largest", "spikes by seed"]
    columns += ["norm grew before", "gradient norm grew before", "highest loss"]
    note = (
        f"Grew before: spikes before which it had grown over {LEAD_STEPS} steps / spikes, and how its growth ranks among all "
        f"stretches of {LEAD_STEPS} steps of the run (mean; 0.5 means that spikes do not follow growth). Highest loss: over the first "
        f"one, where it is above {EXCURSION:g} times it, its step, and the factor of the norm over the {RUN_UP_STEPS} steps before."
    )
    return Table("Contexts", columns, rows, note, frozenset((0, 1)))


def _told(leads: Sequence[Lead]) -> str:
    total = sum(leads, Lead(0, 0, ()))
    if total.spikes == 0:
        return NONE
    mean, deviation = mean_and_deviation(total.ranks)
    error = "" if deviation is None else f" +- {deviation / len(total.ranks) ** 0.5:.2f}"
    return f"{total.grew}/{total.spikes}, rank {mean:.2f}{error}"


def _excursions(found: Sequence[Excursion]) -> str:
    told = [
        f"x{one.height:.1f} @{one.step}" + ("" if one.growth is None else f" norm x{one.growth:.3g}")
        for one in sorted(found, key=lambda one: -one.height)
    ]
    return "; ".join(told) or NONE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 when the picture is written, 2 when there is nothing to draw."""
    given = parser_of("contexts", __doc__, picture="contexts.png").parse_args(arguments)
    runs = readable_runs(given.folders)
    if not any(points(run.lines, "context/norm_mean")[0] for run in runs):
        allowed = "at least one run of a model with a context. Train one, for instance with sweep=context_updates."
        refuse(runs, "has logged context/norm_mean", allowed)
    groups = group_runs(runs, METRIC)
    show([norm_table(groups)])
    keep(draw_contexts(groups), given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
