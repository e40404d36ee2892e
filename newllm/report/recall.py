"""`python -m newllm.report.recall <folders>`: accuracy of recall probes against state bytes, and by slice; tables and a picture."""

import sys
from collections.abc import Iterable, Sequence
from math import log2

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from newllm.report.command import keep, measured_runs, parser_of, readable_runs, refuse_unmeasured, show
from newllm.report.probes import EQUAL_BYTES, PAPER, READINGS, Memory, Probe, probes_of
from newllm.report.statistics import interval, mean_and_deviation
from newllm.report.style import COLOURS, FAINT, new_figure, styled, tidy
from newllm.report.tables import NONE, Table, number, with_interval

WORDS = {
    "accuracy": "accuracy",
    "memory_off": "memory off",
    "other_memory": "another's memory",
    "outdated_share": "old value",
}
MOST_TICKS = 8
NOTE = (
    "Shares of validation targets that the best weights answer right, mean over seeds with the 95 % interval of resampled seeds. State "
    "bytes of one text after a row. Of several settings of one kind of memory at the same bytes, such as learning rates (tried), the one "
    f"that is best on the seeds they share. minus {PAPER}: against the paper's kernel in the same layers at state bytes within "
    f"{EQUAL_BYTES:.0%}, paired by seed. Guessing: {{chance}}."
)
SLICE_NOTE = (
    "Shares of targets, the best weights, mean over seeds with the 95 % interval of resampled seeds; targets of one seed. off: nothing is "
    "written, an empty memory is read. another's: that of another row is read."
)


def recall_table(probe: Probe) -> Table:
    """One row for each kind of memory and size of state: its best setting, what it answers, how much more than the paper's kernel."""
    rows = []
    for memory in probe.memories:
        gain = probe.gain(memory)
        told = NONE if gain is None else with_interval(gain.mean, gain.low, gain.high, sign="+")
        rows.append(
            [
                *(memory.group.letter, memory.name, number(memory.state_bytes), memory.group.label),
                *(str(memory.tried), ",".join(map(str, sorted(memory.accuracies)))),
                _shares(list(memory.accuracies.values())),
                *(_shares(memory.knocked_out(reading)) for reading in ("memory_off", "other_memory")),
                told,
            ]
        )
    columns = [
        "",
        "memory",
        "state bytes",
        "best setting",
        "tried",
        "seeds",
        "accuracy",
        "memory off",
        "another's memory",
    ]
    note = NOTE.format(chance=number(probe.chance))
    return Table(f"{probe.name}: accuracy", [*columns, f"minus {PAPER}"], rows, note, frozenset((0, 1, 3, 5)))


def slice_tables(probe: Probe) -> list[Table]:
    """Return a table for each axis of the probe: one row for each memory, length of rows and bucket; none where nothing was measured."""
    by_axis: dict[str, list[list[str]]] = {}
    measured = [(memory, entry) for memory in probe.memories for entry in memory.slices()]
    shown = [name for name in READINGS if any(name in entry.shares for _, entry in measured)]
    for memory, entry in measured:
        shares = (_shares(entry.shares.get(name, [])) for name in shown)
        start = [memory.group.letter, memory.name, number(memory.state_bytes), number(entry.bucket.block_length)]
        rows = by_axis.setdefault(entry.bucket.axis, [])
        rows.append([*start, entry.bucket.name, number(entry.targets), *shares])
    words = [WORDS[name] for name in shown]
    return [
        Table(
            f"{probe.name} by {axis}",
            ["", "memory", "state bytes", "row tokens", axis, "targets", *words],
            rows,
            SLICE_NOTE,
            frozenset((0, 1, 4)),
        )
        for axis, rows in by_axis.items()
    ]


def _shares(values: Sequence[float]) -> str:
    """Mean and interval of one share over seeds."""
    if not values:
        return NONE
    low, high = interval(values) if len(values) > 1 else (None, None)
    return with_interval(mean_and_deviation(values)[0], low, high)


def draw_state_vs_recall(probes: Sequence[Probe]) -> Figure:
    """Draw accuracy against state bytes, a panel for each probe and a line for each kind of memory; guessing is dotted.

    Args:
        probes: at least one.
    """
    with styled():
        figure = new_figure(7.0, 0.2 + 4.4 * len(probes))
        for place, probe in enumerate(probes):
            axes = figure.add_subplot(len(probes), 1, place + 1)
            tidy(axes, f"{probe.name}: recall against bytes of state")
            for row, name in enumerate(dict.fromkeys(memory.name for memory in probe.memories)):
                _draw_line(
                    axes,
                    name,
                    [memory for memory in probe.memories if memory.name == name],
                    COLOURS[row % len(COLOURS)],
                )
            if probe.chance is not None:
                axes.axhline(
                    probe.chance, color=FAINT, linewidth=0.9, linestyle=":", label=f"chance {probe.chance:.2g}"
                )
            sizes = [memory.state_bytes for memory in probe.memories]
            if min(sizes) < 1:
                # A layer without a state takes no bytes: a logarithmic axis needs a linear beginning for it.
                axes.set_xscale("symlog", base=2, linthresh=1.0)
            else:
                axes.set_xscale("log", base=2)
            axes.set_xticks(_apart(sizes))
            axes.xaxis.set_major_formatter(EngFormatter(sep="", places=1))
            axes.minorticks_off()
            axes.set_xlabel("state bytes per text after a row")
            axes.set_ylabel("accuracy, share of targets")
            axes.set_ylim(-0.02, 1.02)
            axes.legend()
        return figure


def _apart(sizes: Iterable[float]) -> list[float]:
    """The sizes that can be written side by side on the axis: all sizes of a few kernels may lie between two powers of two."""
    known = sorted(set(sizes))
    places = [1 + log2(size) if size > 1 else size for size in known]
    least = (places[-1] - places[0]) / MOST_TICKS
    kept: list[int] = []
    for index, place in enumerate(places):
        if not kept or place - places[kept[-1]] >= least:
            kept.append(index)
    return [known[index] for index in kept]


def _draw_line(axes: Axes, name: str, memories: Sequence[Memory], colour: str) -> None:
    """Means by bytes, with the interval over seeds."""
    values = [list(memory.accuracies.values()) for memory in memories]
    means = [mean_and_deviation(seeds)[0] for seeds in values]
    ends = [interval(seeds) for seeds in values]
    spread = (
        [mean - low for mean, (low, _) in zip(means, ends, strict=True)],
        [high - mean for mean, (_, high) in zip(means, ends, strict=True)],
    )
    sizes = [memory.state_bytes for memory in memories]
    axes.errorbar(sizes, means, yerr=spread, color=colour, marker="o", markersize=5, capsize=2, label=name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 when the picture is written, 2 when there is nothing to tell."""
    given = parser_of("recall", __doc__, picture="state_vs_recall.png").parse_args(arguments)
    runs = readable_runs(given.folders)
    probes = probes_of(measured_runs(runs, "recall"))
    if not probes:
        refuse_unmeasured(runs, "recall")
    show(table for probe in probes for table in (recall_table(probe), *slice_tables(probe)))
    keep(draw_state_vs_recall(probes), given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
