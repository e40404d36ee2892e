"""`python -m newllm.report <folders>`: compare runs in a page, a table in the terminal, pictures and a CSV file."""

import difflib
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from newllm.arguments import Parser, folder
from newllm.config.command_line import refuse
from newllm.report.collect import RunCurves, Unreadable, collect
from newllm.report.groups import Group, group_runs
from newllm.report.page import page
from newllm.report.pictures import draw_overlay, draw_pareto
from newllm.report.style import save_png
from newllm.report.tables import (
    Table,
    as_csv,
    as_text,
    beside_each_other,
    cost_table,
    counted,
    difference_table,
    guard_table,
    result_table,
    runs_table,
    settings_table,
)
from newllm.whole_file import write_whole

MOST_SINGLE_CURVES = 12  # a picture of a run is about 100 kB of the page


def report(folders: Sequence[Path], *, metric: str, baseline: str | None, output: Path | None) -> Path:
    """Write report.html, report.csv and the pictures, print the table, and return where the page is.

    Args:
        folders: run folders, or folders that hold them at any depth.
        metric: what is compared, the best first.
        baseline: letter or part of the label of the configuration that the others are compared with; None for the one
            with the best mean.
        output: folder of the report; None for the given folder, of several the one that holds them all.
    Raises:
        ValueError: there is no run to report, no run has the metric, or no configuration is the baseline.
    """
    runs, unreadable = collect(folders)
    if not runs:
        raise ValueError(_no_run(folders, unreadable))
    _check_metric(runs, metric)
    groups = group_runs(runs, metric)
    place = output or (folders[0] if len(folders) == 1 else Path(os.path.commonpath([f.resolve() for f in folders])))
    place.mkdir(parents=True, exist_ok=True)
    differences = difference_table(groups, metric, _baseline(groups, baseline))
    costs, curves, pareto = cost_table(groups), place / "report_curves.png", place / "report_pareto.png"
    save_png(draw_overlay(groups, metric), curves)
    save_png(draw_pareto(groups, metric), pareto)
    sections: list[Table | tuple[str, Path]] = [result_table(groups, metric), costs, differences]
    sections += [("Curves", curves), (f"{metric} and cost", pareto)]
    sections += [settings_table(groups), guard_table(groups), runs_table(groups, metric)]
    summary = _summary(runs, groups, unreadable)
    content = page(f"newllm report: {metric}", summary, sections, _single_curves(groups), unreadable)
    write_whole(place / "report.html", content)
    write_whole(place / "report.csv", as_csv(groups))
    results = result_table(groups, metric, beside=("val/bits_per_byte",))
    _tell(beside_each_other(results, costs), differences, summary, unreadable)
    print(f"report: {place / 'report.html'}")
    return place / "report.html"


def _tell(results: Table, differences: Table, summary: str, unreadable: Sequence[Unreadable]) -> None:
    width = shutil.get_terminal_size((120, 24)).columns
    print(as_text(results, width=width))
    if differences.rows:
        print(f"\n{differences.note}\n{as_text(differences, width=width)}")
    print("\n" + "\n".join([summary, *(f"not readable: {item.folder}: {item.reason}" for item in unreadable)]))


def _no_run(folders: Sequence[Path], unreadable: Sequence[Unreadable]) -> str:
    found = "".join(f"\n  {item.folder}: {item.reason}" for item in unreadable)
    hold = "holds" if len(folders) == 1 else "hold"
    return (
        f"report: {', '.join(map(str, folders))} {hold} no run that can be read. Allowed: folders that train.py wrote, "
        f"or folders of such. Check the paths.{found}"
    )


def _check_metric(runs: Sequence[RunCurves], metric: str) -> None:
    known = sorted({name for run in runs for line in run.lines for name in line} - {"step", "tokens"})
    if known and metric not in known:
        closest = difflib.get_close_matches(metric, known, n=1)
        hint = f" Closest: {closest[0]}." if closest else ""
        raise ValueError(
            f"--metric={metric}: was logged by no run. Allowed: {', '.join(known)}.{hint} Choose one of these."
        )


def _baseline(groups: Sequence[Group], wanted: str | None) -> Group:
    if wanted is None:
        return groups[0]
    found = [group for group in groups if wanted == group.letter] or [g for g in groups if wanted in g.label]
    if len(found) != 1:
        labels = "".join(f"\n  {group.letter}  {group.label}" for group in groups)
        raise ValueError(
            f"--baseline={wanted}: names {len(found)} configurations. Allowed: a letter or a part of one label:{labels}\n"
            "Name one of these."
        )
    return found[0]


def _summary(runs: Sequence[RunCurves], groups: Sequence[Group], unreadable: Sequence[Unreadable]) -> str:
    statuses = [run.status for run in runs]
    told = ", ".join(f"{statuses.count(status)} {status}" for status in sorted(set(statuses)))
    repeated = any(group.num_finished > len(group.by_seed) for group in groups)
    more = "; of finished runs with the same seed the last one counts" if repeated else ""
    more += f"; {counted(len(unreadable), 'folder')} not readable" if unreadable else ""
    return f"{counted(len(runs), 'run')} of {counted(len(groups), 'configuration')} ({told}){more}"


def _single_curves(groups: Sequence[Group]) -> list[tuple[str, Path]]:
    pictures = [
        (f"{group.letter}  {group.label}  seed {run.seed}", run.run.folder / "curves.png")
        for group in groups
        for run in group.runs
        if (run.run.folder / "curves.png").exists()
    ]
    return pictures if len(pictures) <= MOST_SINGLE_CURVES else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 when the report is written, 2 when there is nothing to report."""
    parser = Parser(prog="python -m newllm.report", description=__doc__)
    parser.add_argument("folders", nargs="+", type=folder, help="run folders, or folders that hold them")
    parser.add_argument("--metric", default="val/loss", help="what is compared (val/loss)")
    parser.add_argument(
        "--baseline", help="letter or part of the label of the configuration to compare with (the best)"
    )
    parser.add_argument("--output", type=folder, help="folder of the report (where the runs are)")
    given = parser.parse_args(arguments)
    try:
        report(given.folders, metric=given.metric, baseline=given.baseline, output=given.output)
    except ValueError as error:
        refuse([str(error)])
    except BrokenPipeError:  # who reads the table (head, less) has seen enough; the page is written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        refuse([f"report: {error}. Allowed: a folder that can be written. Choose another with --output."])
    return 0


if __name__ == "__main__":
    sys.exit(main())
