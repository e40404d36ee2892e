import math
import subprocess
import sys
from pathlib import Path

from PIL import Image

from newllm.report.collect import RunCurves
from newllm.report.curves import PANELS, _figure, draw_curves, points, smoothed
from newllm.report.groups import Group
from newllm.report.pictures import draw_overlay
from newllm.run_record import append_metrics

LINES = [
    {"step": 10, "tokens": 80, "train/loss": 3.0, "speed/tokens_per_second": 100.0},
    {"step": 20, "tokens": 160, "train/loss": math.nan, "val/loss": 2.5, "lag/relative_error": 0.5},
]


def test_points_leave_out_what_is_missing_or_not_finite() -> None:
    assert points(LINES, "train/loss") == ([10], [3.0])
    assert points(LINES, "val/loss") == ([20], [2.5])
    assert points(LINES, "memory/gate_mean") == ([], [])


def test_smoothing_shifts_a_straight_line_nowhere() -> None:
    line = [float(place) for place in range(300)]

    assert smoothed(line) == line


def test_only_panels_with_data_are_drawn() -> None:
    titles = [axes.get_title(loc="left") for axes in _figure(LINES).axes]

    assert titles == ["loss (nats per token)", "lag of the cached states", "tokens per second"]


def test_every_metric_of_the_contract_has_a_panel() -> None:
    everything = [{"step": 1, "tokens": 8, **{name: 0.5 for panel in PANELS for name in panel.names}}]

    assert len(_figure(everything).axes) == 1 + len(PANELS)


def test_picture_is_written_whole_even_for_a_run_that_logged_nothing(tmp_path: Path) -> None:
    for line in LINES:
        append_metrics(tmp_path, line)
    (tmp_path / "empty").mkdir()

    for folder in (tmp_path, tmp_path / "empty"):
        with Image.open(draw_curves(folder)) as picture:
            picture.verify()
            assert picture.width > 1000


def test_drawing_imports_no_torch(tmp_path: Path) -> None:
    code = f"import sys; from newllm.report.curves import draw_curves; draw_curves({str(tmp_path)!r})"
    code += "; print('torch' in sys.modules, 'matplotlib.pyplot' in sys.modules)"

    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert answer.stdout == "False False\n"


def test_no_legend_lies_over_its_curves() -> None:
    """The worst case of a panel from 0 to 1: curves at its top and at its bottom, over all of its width."""
    names = [name for panel in PANELS for name in panel.names]
    lines = [{"step": step, **{name: float(place % 2) for place, name in enumerate(names)}} for step in range(1, 40)]

    figure = _figure(lines)
    figure.canvas.draw()

    crowded = [axes for axes in figure.axes[1:] if axes.get_legend() is not None]
    assert len(crowded) == sum(len(panel.names) > 1 for panel in PANELS) == 3
    for axes in crowded:
        box = axes.get_legend().get_window_extent()
        places = [place for line in axes.lines for place in axes.transData.transform(line.get_xydata())]
        assert not any(box.contains(*place) for place in places), axes.get_title(loc="left")


def test_ticks_of_a_norm_are_plain_numbers() -> None:
    lines = [{"step": step, "tokens": step, "optim/grad_norm": norm} for step, norm in ((1, 2.0), (2, 7.0))]
    figure = _figure(lines)
    figure.canvas.draw()

    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left") == "gradient norm"]

    told = {label.get_text() for which in ("major", "minor") for label in axes.get_yticklabels(which=which)} - {""}
    assert {"3", "4"} <= told
    assert all(text.replace(".", "").isdigit() for text in told), told


def test_every_tick_stands_where_its_label_says() -> None:
    figure = _figure([{"step": step, "tokens": 8, "train/loss": 5.445 - 0.009 * step} for step in range(4)])
    figure.draw_without_rendering()

    ticks = zip(figure.axes[0].get_yticks(), figure.axes[0].get_yticklabels(), strict=True)

    assert all(abs(float(label.get_text()) - tick) < 1e-4 for tick, label in ticks)


def test_the_overlay_shows_a_run_of_one_step_and_its_legend_beside_the_curves() -> None:
    run = RunCurves(run=None, lines=[{"step": 1, "tokens": 8, "val/loss": 5.0}], settings={})
    figure = draw_overlay([Group("A", "a name " * 20, {}, [run])], "val/loss")
    figure.draw_without_rendering()

    below = figure.legends[0].get_window_extent().y1

    assert figure.axes[0].get_lines()[0].get_marker() == "o"
    assert all(axes.get_window_extent().y0 > below for axes in figure.axes)
