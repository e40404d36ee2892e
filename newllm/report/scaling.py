"""`python -m newllm.report.scaling <folders>`: how the loss of a sweep falls with the size of its training text; writes
alpha_progression.json and scaling.png.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from newllm.arguments import folder
from newllm.config.command_line import refuse
from newllm.report.collect import RunCurves
from newllm.report.command import parser_of, readable_runs, show
from newllm.report.groups import Group, group_runs
from newllm.report.style import COLOURS, FAINT, new_figure, save_png, styled, tidy
from newllm.report.tables import NONE, Table, number
from newllm.scaling import RESAMPLES, Change, Window, change_of, check_points, fit_windows
from newllm.whole_file import write_whole

METRIC = "val/loss"
WINDOW = 4  # sizes
# What grows with the text: steps, and what is counted in them.
GROWING = (
    "data.max_train_blocks",
    "schedule.warmup_steps",
    "trainer.checkpoint_every_steps",
    "trainer.log_every_steps",
    "trainer.max_steps",
    "trainer.validate_every_steps",
)
HOW = "python train.py experiment=scaling"


@dataclass(frozen=True)
class Progression:
    """Runs of one configuration over sizes of training text, and the power laws through them.

    Attributes:
        label: what tells the configuration from the others.
        points: size (targets of the training text), seed, loss (nats per token) and folder of every finished run.
        unfinished: runs that are not finished, which no fit knows of.
        whole: all sizes.
        windows: every run of consecutive sizes of the asked length; the same as `whole` where there are no more.
        changes: from each window to the next.
    """

    label: str
    points: Sequence[dict[str, Any]]
    unfinished: int
    whole: Window
    windows: Sequence[Window]
    changes: Sequence[Change]

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain containers."""
        return {
            "configuration": self.label,
            "metric": METRIC,
            "points": list(self.points),
            "unfinished_runs": self.unfinished,
            "all_sizes": _plain(self.whole),
            "windows": [_plain(window) for window in self.windows],
            "changes": [asdict(change) for change in self.changes],
        }


def progressions(runs: Sequence[RunCurves], *, window: int = WINDOW, resamples: int = RESAMPLES) -> list[Progression]:
    """Return the power laws of every configuration among runs over sizes of training text.

    Args:
        runs: of one or more configurations; those that are not finished are counted and left out.
        window: sizes in a window; where there are fewer, all sizes are the only one.
        resamples: for the intervals.
    Raises:
        ValueError: no finished run, fewer than 3 sizes, another validation text or another number of steps per token among the sizes.
    """
    alike = [replace(run, settings={k: v for k, v in run.settings.items() if k not in GROWING}) for run in runs]
    groups = [group for group in group_runs(alike, METRIC) if any(run.status == "finished" for run in group.runs)]
    if not groups:
        raise ValueError(
            f"scaling: none of {len(runs)} runs is finished. Allowed: at least 3 sizes of training text. Type: {HOW}"
        )
    return [_progression(group, window, resamples) for group in groups]


def _progression(group: Group, window: int, resamples: int) -> Progression:
    finished = [run for run in group.runs if run.status == "finished" and run.last(METRIC) is not None]
    _check_alike(group.label, finished)
    points = sorted((_point(run) for run in finished), key=lambda point: (point["size"], point["seed"]))
    sizes, losses = [point["size"] for point in points], [point["loss"] for point in points]
    try:
        check_points(sizes, losses)
    except ValueError as error:
        raise ValueError(f"{error} ({group.label}; sizes {sorted(set(sizes))}) Type: {HOW}") from error
    distinct = len(set(sizes))
    (whole,) = fit_windows(sizes, losses, window=distinct, resamples=resamples)
    windows = fit_windows(sizes, losses, window=min(window, distinct), resamples=resamples)
    changes = [change_of(before, after) for before, after in pairwise(windows)]
    return Progression(group.label, points, len(group.runs) - len(finished), whole, windows, changes)


def _point(run: RunCurves) -> dict[str, Any]:
    return {
        "size": _train(run)["targets"],
        "seed": run.seed,
        "loss": run.last(METRIC),
        "steps_per_token": _steps_per_token(run),
        "folder": str(run.run.folder),
    }


def _train(run: RunCurves) -> dict[str, Any]:
    return run.run.facts["data"]["splits"]["train"]


def _steps_per_token(run: RunCurves) -> float:
    return run.run.config["trainer"]["max_steps"] / _train(run)["targets"]


def _check_alike(label: str, runs: Sequence[RunCurves]) -> None:
    """Refuse sizes that differ in more than their size."""
    texts = {tuple(_validation(run).items()) for run in runs}
    if len(texts) > 1:
        told = "; ".join(sorted(", ".join(f"{name} {value}" for name, value in text) for text in texts))
        raise ValueError(
            f"scaling: the runs of {label} were validated on different texts ({told}). Allowed: one for all sizes. "
            "Set data.max_validation_blocks to the same number, or choose one data and tokenizer."
        )
    rates = [_steps_per_token(run) for run in runs]
    if max(rates) > 1.02 * min(rates):
        raise ValueError(
            f"scaling: the runs of {label} made {min(rates):.3g} to {max(rates):.3g} steps per training token. Allowed: equal numbers, "
            f"else training time passes for text. Set trainer.max_steps in proportion to data.max_train_blocks, as {HOW} does."
        )


def _validation(run: RunCurves) -> dict[str, Any]:
    text = run.run.facts["data"]["splits"]["validation"]
    return {name: text[name] for name in ("documents", "targets", "bytes")}


def _plain(window: Window) -> dict[str, Any]:
    law, low_high = window.law, window.interval
    return {
        "sizes": list(window.sizes),
        "power_law": {"E": law.floor, "A": law.factor, "alpha": law.alpha, "alpha_interval_95": low_high},
        "log_perplexity": asdict(window.line),
        "without_irreducible_loss": asdict(window.log_log),
    }


def write_progressions(found: Sequence[Progression], folder: Path) -> tuple[Path, Path]:
    """Write alpha_progression.json and scaling.png, each whole or not at all, and return where they are."""
    numbers, picture = folder / "alpha_progression.json", folder / "scaling.png"
    write_whole(numbers, json.dumps([progression.as_json() for progression in found], indent=2, allow_nan=False) + "\n")
    save_png(draw_progressions(found), picture)
    return numbers, picture


def draw_progressions(found: Sequence[Progression]) -> Figure:
    """Draw losses over sizes with the fitted laws, and alpha with its interval window by window."""
    with styled():
        figure = new_figure(12.0, 4.6)
        left, right = figure.subplots(1, 2)
        tidy(left, f"{METRIC} (nats per token) against training targets")
        tidy(right, "alpha of each window, with its 95 % interval")
        for place, progression in enumerate(found):
            colour = COLOURS[place] if place < len(COLOURS) else FAINT
            _draw_losses(left, progression, colour)
            _draw_alphas(right, progression, colour, place)
        left.set_xscale("log")
        left.xaxis.set_major_formatter(EngFormatter(sep=""))
        left.xaxis.set_minor_formatter("")
        left.set_xlabel("targets of the training text")
        right.set_xlabel("largest size of the window, targets")
        right.set_xscale("log")
        right.xaxis.set_major_formatter(EngFormatter(sep=""))
        right.xaxis.set_minor_formatter("")
        left.legend()
        return figure


def _draw_losses(axes: Axes, progression: Progression, colour: str) -> None:
    sizes = np.array([point["size"] for point in progression.points], dtype=np.float64)
    axes.plot(sizes, [point["loss"] for point in progression.points], "o", color=colour, markersize=4, alpha=0.7)
    line = np.geomspace(sizes.min(), sizes.max(), 100)
    law = progression.whole.law
    told = f"{law.floor:.2f} + {law.factor:.3g} N^-{law.alpha:.3f}  {progression.label}"
    axes.plot(line, law(line), color=colour, linewidth=1.3, label=told)


def _draw_alphas(axes: Axes, progression: Progression, colour: str, place: int) -> None:
    for window in progression.windows:
        alpha, interval = window.law.alpha, window.interval
        spread = None if interval is None else [[max(0.0, alpha - interval[0])], [max(0.0, interval[1] - alpha)]]
        beside = window.sizes[-1] * 1.02**place
        axes.errorbar(beside, alpha, yerr=spread, color=colour, marker="o", markersize=5, capsize=3)


def progression_table(found: Sequence[Progression]) -> Table:
    """One row for all sizes and one for each window of every configuration."""
    rows = []
    for progression in found:
        named: list[tuple[str, Window, Change | None]] = [("all sizes", progression.whole, None)]
        changes = [None, *progression.changes]
        if len(progression.windows) > 1:
            pairs = enumerate(zip(progression.windows, changes, strict=True), start=1)
            named += [(f"window {place}", window, change) for place, (window, change) in pairs]
        rows += [[progression.label, name, *_cells(window, change)] for name, window, change in named]
    columns = ["configuration", "sizes", "targets", "E", "A", "alpha (95 %)", "ln PPL slope", "R2", "p", "stderr"]
    columns += ["alpha without E", "change of alpha (95 %)", "verdict"]
    note = "L(N) = E + A N^-alpha, Huber loss; intervals of resampled residuals. ln PPL = a + slope ln N. Without E: ln L against ln N."
    return Table("Scaling", columns, rows, note, frozenset((0, 1, 2, 5, 11, 12)))


def _cells(window: Window, change: Change | None) -> list[str]:
    law, line = window.law, window.line
    return [
        f"{window.sizes[0]:,.0f} to {window.sizes[-1]:,.0f}",
        number(law.floor),
        number(law.factor),
        _with_interval(law.alpha, window.interval),
        f"{line.alpha:.3f}",
        f"{line.r_squared:.4f}",
        f"{line.p_value:.2g}",
        f"{line.standard_error:.3f}",
        f"{window.log_log.alpha:.3f}",
        NONE if change is None else _with_interval(change.alpha, change.interval),
        NONE if change is None else change.verdict,
    ]


def _with_interval(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.3f} (no interval)" if interval is None else f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 when the files are written, 2 when there is nothing to fit."""
    parser = parser_of("scaling", __doc__)
    parser.add_argument("--window", type=int, default=WINDOW, help=f"sizes in a window ({WINDOW})")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help=f"for the intervals ({RESAMPLES})")
    parser.add_argument("--output", type=folder, help="folder of the files (the first folder)")
    given = parser.parse_args(arguments)
    runs = readable_runs(given.folders)
    try:
        found = progressions(runs, window=given.window, resamples=given.resamples)
    except ValueError as error:
        refuse([str(error)])
    numbers, picture = write_progressions(found, given.output or given.folders[0])
    table = progression_table(found)
    show([table])
    missing = sum(progression.unfinished for progression in found)
    if missing:
        print(f"{missing} runs are not finished and count in no fit.")
    print(f"numbers: {numbers}\npicture: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
