"""One look for all pictures: quiet axes, colours that stay apart for colour-blind eyes and in grey."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, LogFormatter, NullFormatter

from newllm.whole_file import whole_file

INK, FAINT, GRID = "#1f2430", "#6b7280", "#e5e7eb"
COLOURS = ("#3366cc", "#d1495b", "#2a9d8f", "#e09f3e", "#7b4fa3", "#5a6b7b", "#8c564b", "#17a2c6")
_SETTINGS: dict[Any, Any] = {
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
}


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of the given size in inches; no global state of matplotlib is touched."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _number(value: float, *, digits: int = 3) -> str:
    """A tick: thousands apart, small numbers by powers of ten."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


class _Numbers(Formatter):
    """Ticks with as many digits as they need to stand where they say: of a narrow axis, 5.425 is not 5.42."""

    def __call__(self, value: float, position: int | None = None) -> str:
        return _number(value)

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        slack = 0.01 * min((high - low for low, high in pairwise(sorted(set(values)))), default=math.inf)
        digits = (n for n in range(3, 9) if all(abs(float(f"{value:.{n}g}") - value) < slack for value in values))
        enough = next(digits, 9)
        return [_number(value, digits=enough) for value in values]


class _FewNumbers(LogFormatter):
    """Ticks between the powers of ten: told where there are few powers, left out where the labels would lie over each other."""

    def __call__(self, value: float, position: int | None = None) -> str:
        return _number(value) if super().__call__(value, position) else ""


def tidy(axes: Axes, title: str) -> None:
    """Give axes their title, on the left, and take away what carries no information."""
    axes.set_title(title, loc="left", fontsize=9.5, color=INK, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_formatter(_Numbers())
    axes.yaxis.set_minor_formatter(_FewNumbers() if axes.get_yscale() == "log" else NullFormatter())


def styled() -> AbstractContextManager[None]:
    """Return a context in which text and ticks have the house's sizes and colours."""
    return rc_context(_SETTINGS)


def save_png(figure: Figure, path: Path, *, dots_per_inch: int = 130) -> None:
    """Write a figure as PNG, whole or not at all."""
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=dots_per_inch)
