"""The tables of a report: groups, differences, settings, runs, guards. Every cell is text, ready to show."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from newllm.report.collect import RunCurves
from newllm.report.groups import Group, text, total
from newllm.report.statistics import mean_and_deviation, paired_difference

NONE = "-"
# Beside the metric that is compared: shown where any run has them.
BESIDE = (
    *("val/loss", "val/loss_lagged", "val/loss_no_feedback", "val/bits_per_byte", "val/perplexity", "val/accuracy"),
    *("lag/relative_error", "lag/sweeps_to_tolerance", "memory/gate_mean", "context/converged_share"),
    *("val/loss_weighted", "val/mean_steps", "trm/gradient_cosine"),
)
COSTS = (
    ("parameters", "parameters"),
    ("flops_per_token", "FLOPs/token"),
    ("state_bytes", "state bytes"),
    ("tokens", "tokens seen"),
    ("tokens_per_second", "tokens/s"),
    ("wall_seconds", "wall seconds"),
)


@dataclass(frozen=True)
class Table:
    """Columns and rows of text; `note` says how to read them."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    texts: frozenset[int] = field(default_factory=frozenset)  # columns that are no numbers


def number(value: float | None) -> str:
    """Return a number with four significant digits or, from a thousand on, with its thousands apart."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:#.4g}"


def with_interval(mean: float, low: float | None, high: float | None, *, sign: str = "") -> str:
    """Return a mean and, where there is one, its interval, as `0.4000 (0.3075 .. 0.4925)`; `sign="+"` writes plus signs too."""
    told = f"{mean:{sign}.4f}"
    return told if low is None or high is None else f"{told} ({low:{sign}.4f} .. {high:{sign}.4f})"


def counted(count: int, noun: str) -> str:
    """Return a number of things in words."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation, as `5.602 +- 0.011`; the deviation with the digits of the mean."""
    if not values:
        return NONE
    mean, deviation = mean_and_deviation(values)
    if deviation is None:
        return f"{mean:.4f}" if abs(mean) < 100 else number(mean)
    return f"{mean:.4f} +- {deviation:.4f}" if abs(mean) < 100 else f"{number(mean)} +- {number(deviation)}"


def result_table(groups: Sequence[Group], metric: str, *, beside: Sequence[str] = BESIDE) -> Table:
    """One row per configuration: the compared metric and what stands beside it."""
    beside = [name for name in beside if name != metric and any(group.values(name) for group in groups)]
    rows = []
    for group in groups:
        finished = group.by_seed.values()
        best = [value for value in (run.best(metric) for run in finished) if value is not None]
        measured = [spread(list(group.values(name).values())) for name in beside]
        told = [
            str(len(finished)),
            f"{group.num_finished}/{len(group.runs)}",
            spread(list(group.values(metric).values())),
            spread(best),
        ]
        rows.append([group.letter, group.label, *told, *measured])
    columns = ["", "configuration", "seeds", "finished", f"{metric} last", f"{metric} best", *beside]
    note = (
        "Mean +- standard deviation (n - 1) over the seeds of finished runs; finished: runs / all, of several with one seed the last "
        "one counts. "
        "Losses in nats per token."
    )
    return Table("Results", columns, rows, note, frozenset((0, 1)))


def cost_table(groups: Sequence[Group]) -> Table:
    """One row per configuration: what it cost."""
    costs = [(name, title) for name, title in COSTS if any(group.facts(name) for group in groups)]
    paid = [[_mean_of_all(group, name) for name, _ in costs] for group in groups]
    rows = [[group.letter, group.label, *cells] for group, cells in zip(groups, paid, strict=True)]
    note = (
        f"Means over finished runs, {NONE} where one does not know. FLOPs of one forward pass per emitted token, all its steps; "
        "state bytes per text after a block of the training length."
    )
    return Table("Costs", ["", "configuration", *(title for _, title in costs)], rows, note, frozenset((0, 1)))


def _mean_of_all(group: Group, name: str) -> str:
    """The mean of a fact over all finished runs; none over those that happen to know it."""
    facts = group.facts(name)
    return number(fmean(facts)) if facts and len(facts) == len(group.by_seed) else NONE


def beside_each_other(left: Table, right: Table) -> Table:
    """Return the rows of both tables as one, for a terminal; the right one's letter and label are not repeated."""
    rows = [[*start, *rest[2:]] for start, rest in zip(left.rows, right.rows, strict=True)]
    return Table(left.title, [*left.columns, *right.columns[2:]], rows, left.note, left.texts)


def difference_table(groups: Sequence[Group], metric: str, baseline: Group) -> Table:
    """How much higher the metric of every group is than the baseline's, paired by seed."""
    rows = []
    for group in groups:
        found = paired_difference(group.values(metric), baseline.values(metric))
        if group is baseline or found is None:
            continue
        between = NONE if found.low is None or found.high is None else f"{found.low:+.4f} .. {found.high:+.4f}"
        seeds = ",".join(map(str, found.seeds))
        rows.append([group.letter, group.label, f"{found.mean:+.4f}", between, str(len(found.seeds)), seeds])
    columns = ["", "configuration", "difference", "95 % interval", "pairs", "seeds"]
    note = (
        f"{metric} of each configuration minus that of {baseline.letter} ({baseline.label}), over the seeds both have. "
        "Interval: percentile bootstrap of the mean difference; with few pairs it cannot leave their range."
    )
    return Table("Differences", columns, rows, note, frozenset((0, 1, 5)))


def settings_table(groups: Sequence[Group]) -> Table:
    """Only the settings in which the configurations differ; the longer side becomes the rows."""
    keys = list(dict.fromkeys(key for group in groups for key in group.settings))
    if not keys:
        return Table("Settings that differ", [], [])

    def cell(group: Group, key: str) -> str:
        return text(group.settings[key]) if key in group.settings else NONE

    if len(keys) > len(groups):
        columns = ["setting", *(group.letter for group in groups)]
        rows = [[key, *(cell(group, key) for group in groups)] for key in keys]
    else:
        columns = ["", *keys]
        rows = [[group.letter, *(cell(group, key) for key in keys)] for group in groups]
    return Table("Settings that differ", columns, rows, "Without the seed.", frozenset(range(len(columns))))


def runs_table(groups: Sequence[Group], metric: str) -> Table:
    """One row per run, whatever became of it."""
    rows = [
        [
            group.letter,
            str(run.seed),
            run.status,
            _steps(run),
            number(run.last(metric)),
            _verdict(run),
            str(run.run.folder),
        ]
        for group in groups
        for run in sorted(group.runs, key=lambda run: run.seed)
    ]
    columns = ["", "seed", "status", "steps", metric, "guards", "folder"]
    return Table("Runs", columns, rows, "Last value logged.", frozenset((0, 2, 5, 6)))


def guard_table(groups: Sequence[Group]) -> Table:
    """What guards had to say, where it was not that all is well."""
    rows = [
        [group.letter, str(run.seed), verdict["name"], verdict["status"], verdict["message"], str(run.run.folder)]
        for group in groups
        for run in group.runs
        for verdict in run.run.facts.get("guards", [])
        if verdict["status"] not in ("passed", "not applicable")
    ]
    columns = ["", "seed", "guard", "status", "message", "folder"]
    return Table("Findings of the guards", columns, rows, "", frozenset((0, 2, 3, 4, 5)))


def _steps(run: RunCurves) -> str:
    return number(run.lines[-1]["step"]) if run.lines else NONE


def _verdict(run: RunCurves) -> str:
    found = [verdict["status"] for verdict in run.run.facts.get("guards", [])]
    counted = ((status, found.count(status)) for status in ("failed", "warning", "off", "passed"))
    return ", ".join(f"{count} {status}" for status, count in counted if count) or NONE


def as_text(table: Table, *, width: int) -> str:
    """Return a table for a terminal of the given width; a row that is longer goes on, nothing is cut off."""
    columns = list(zip(table.columns, *table.rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in (table.columns, *table.rows):
        cells = (
            cell.ljust(size) if place in table.texts else cell.rjust(size)
            for place, (cell, size) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    rule = "-" * min(width, max(map(len, lines)))
    return "\n".join([lines[0], rule, *lines[1:]])


def as_csv(groups: Sequence[Group]) -> str:
    """Return one row per run: the settings that differ, the last value of every metric and the costs, as numbers."""
    keys = list(dict.fromkeys(key for group in groups for key in group.settings))
    metrics = sorted({name for group in groups for run in group.runs for line in run.lines for name in line})
    metrics = [name for name in metrics if name not in ("step", "tokens")]
    costs = [name for name, _ in COSTS]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["configuration", "folder", "seed", "status", *keys, *metrics, *costs])
    for group in groups:
        settings = [text(group.settings[key]) if key in group.settings else "" for key in keys]
        for run in group.runs:
            paid = [total(run.run.facts.get(name)) for name in costs]
            row = [group.letter, run.run.folder, run.seed, run.status, *settings, *map(run.last, metrics), *paid]
            writer.writerow(["" if value is None else value for value in row])
    return file.getvalue()
