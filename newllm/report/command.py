"""What the commands of newllm.report share: folders in, tables in the terminal, a picture beside the runs."""

import argparse
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from matplotlib.figure import Figure

from newllm.arguments import Parser, folder
from newllm.config.command_line import refuse as refuse_all
from newllm.report.collect import RunCurves, collect
from newllm.report.evaluated import with_measurement
from newllm.report.style import save_png
from newllm.report.tables import Table, as_text, counted


def parser_of(name: str, about: str | None, *, picture: str | None = None) -> argparse.ArgumentParser:
    """Return a parser of the folders, and of where the picture goes where there is one.

    Args:
        name: of the module below newllm.report.
        about: what the command does.
        picture: file name that the picture has if no other is asked for.
    """
    parser = Parser(prog=f"python -m newllm.report.{name}", description=about)
    parser.add_argument("folders", nargs="+", type=folder, help="run folders, or folders that hold them")
    if picture is not None:
        parser.add_argument("--output", type=folder, help=f"picture to write ({picture} in the first folder)")
        parser.set_defaults(picture=picture)
    return parser


def readable_runs(folders: Iterable[Path]) -> list[RunCurves]:
    """Return the runs at or below the folders; what cannot be read is named on stderr."""
    runs, unreadable = collect(folders)
    for item in unreadable:
        print(f"not readable: {item.folder}: {item.reason}", file=sys.stderr)
    return runs


def measured_runs(runs: Sequence[RunCurves], name: str) -> list[RunCurves]:
    """Return the finished runs in which something was measured; those left out are named on stderr, each with what to do."""
    try:
        measured, left_out = with_measurement(runs, name)
    except ValueError as error:
        refuse_all([str(error)])
    for item in left_out:
        print(f"left out: {item.folder}: {item.reason}", file=sys.stderr)
    return measured


def refuse(runs: Sequence[RunCurves], lacking: str, allowed: str) -> NoReturn:
    """Say why there is nothing to tell, and end with exit code 2."""
    refuse_all([f"report: none of {counted(len(runs), 'run')} {lacking}. Allowed: {allowed}"])


def refuse_unmeasured(runs: Sequence[RunCurves], name: str) -> NoReturn:
    """Say that none of the runs has been measured, and end with exit code 2."""
    measure = f"python evaluate.py run=<folder> 'evaluation=[{name}]'"
    refuse(runs, f"has finished with evaluation=[{name}]", f"at least one. Wait, or measure: {measure}.")


def show(tables: Iterable[Table]) -> None:
    """Print tables, each under its title and above its note."""
    width = shutil.get_terminal_size((120, 24)).columns
    for table in tables:
        print(f"{table.title}\n{as_text(table, width=width)}\n{table.note}\n")


def keep(figure: Figure, given: argparse.Namespace) -> None:
    """Write the picture where the parsed arguments want it, and say where that is."""
    path = given.output or given.folders[0] / given.picture
    try:
        save_png(figure, path)
    except OSError as error:
        refuse_all(
            [
                f"{path}: cannot be written ({error.strerror}). Allowed: a picture that can be. Choose another with --output."
            ]
        )
    print(f"picture: {path}")
