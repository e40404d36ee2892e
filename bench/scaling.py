"""How duration and peak memory of a training step grow with T, B, D and K, and those of one generated token with the tokens read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from bench.measure import DEVICE, Found, Row, peak_bytes, require_quiet, table, take_turns
from bench.steps import bare_step, lagged_loss, parallel_loss, random_ids
from newllm.models.create import create_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VOCABULARY = 4096
BASE = {"T": 256, "B": 4, "D": 128, "K": 1}
VALUES = {"T": [64, 128, 256, 512, 1024, 2048], "B": [1, 2, 4, 8, 16], "D": [64, 128, 256, 512], "K": [1, 2, 4, 8]}
CACHED = [64, 256, 1024, 4096, 16384]
# (model, keys): as conf/ has them, and the stack whose state stops growing.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "pythia": ("pythia", {}),
    "infini": ("infini", {}),
    "every layer infini": ("infini", {"stack": ["infini"] * 4}),
}

HEAD = ["axis", "model", "value: duration, peak memory", "exponent of duration", "of memory"]

Points = dict[str, dict[int, tuple[float, int]]]


def training_call(name: str, sizes: dict[str, int]) -> Callable[[], object]:
    """Return a training step: plain, or with K sweeps of Lagged Cache Training where K is what varies."""
    model_name, own = MODELS[name]
    keys = {**own, "dim": sizes["D"], "mlp_dim": 4 * sizes["D"]}
    is_lagged = "lagged" in sizes
    feedback = "additive" if is_lagged else "none"
    model = create_model(model_name, vocab_size=VOCABULARY, seed=0, feedback=feedback, **keys).to(DEVICE)
    inputs, labels = random_ids(sizes["B"], sizes["T"], VOCABULARY)
    loss = lagged_loss(model, inputs, labels, sweeps=sizes["K"]) if is_lagged else parallel_loss(model, inputs, labels)
    return bare_step(model, loss)


def generating_call(name: str, num_read: int) -> Callable[[], object]:
    """Return one more token after `num_read` of them."""
    model_name, own = MODELS[name]
    model = create_model(model_name, vocab_size=VOCABULARY, seed=0, **own).to(DEVICE).eval()
    with torch.no_grad():
        state = model.initial_state(1)
        for ids in random_ids(1, num_read, VOCABULARY)[0].split(1024, dim=1):
            state = model.encode(ids, state).state
    token = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)

    @torch.no_grad()
    def call() -> None:
        model(token, state)

    return call


def measured(calls: dict[str, Callable[[], object]], quick: bool, about: str) -> dict[str, tuple[Row, int]]:
    """Return duration and peak memory of each call."""
    rows = take_turns(calls, rounds=2 if quick else 3, min_seconds=0.1)
    if not quick:
        require_quiet(rows, f"scaling, {about}")
    return {row.name: (row, peak_bytes(calls[row.name])) for row in rows}


def sweep_over(axis: str, quick: bool) -> tuple[Points, dict[str, Any]]:
    """Return duration and bytes of every model at every value of one axis, and the figures behind them."""
    points: Points = {}
    figures: dict[str, Any] = {}
    values = CACHED if axis == "cached tokens" else VALUES[axis]
    for value in values[:2] if quick else values:
        calls = {}
        for name in MODELS:
            sizes = BASE | {axis: value} | ({"lagged": 1} if axis == "K" else {})
            calls[name] = generating_call(name, value) if axis == "cached tokens" else training_call(name, sizes)
        for name, (row, peak) in measured(calls, quick, f"{axis} {value}").items():
            points.setdefault(name, {})[value] = (row.median, peak)
            figures[f"{name}_{value}"] = row.figures() | {"peak_bytes": peak}
        print(axis, value, {name: f"{1000 * found[value][0]:.1f} ms" for name, found in points.items()}, flush=True)
    return points, figures


def last_slopes(by_value: dict[int, tuple[float, int]]) -> tuple[float, float]:
    """Return the exponents with which duration and bytes grow from the last value but one to the last: 1 is proportional."""
    (before, low), (last, high) = list(by_value.items())[-2:]
    return tuple(
        math.log(max(b, 1e-9) / max(a, 1e-9)) / math.log(last / before) for a, b in zip(low, high, strict=True)
    )  # type: ignore[return-value]


def run(quick: bool) -> Found:
    """Measure along every axis."""
    found = {axis: sweep_over(axis, quick) for axis in [*VALUES, "cached tokens"]}
    lines = []
    for axis, (points, _) in found.items():
        for name, by_value in points.items():
            cells = [f"{v}: {1000 * s:.1f} ms, {b / 2**20:.1f} MiB" for v, (s, b) in by_value.items()]
            lines.append([axis, name, "; ".join(cells), *(f"{slope:.2f}" for slope in last_slopes(by_value))])
    figure = _drawn({axis: points for axis, (points, _) in found.items()})
    told = (
        f"Nano size but for what varies; otherwise T {BASE['T']}, B {BASE['B']}, D {BASE['D']}; K: sweeps of Lagged Cache Training. "
        "Duration of a training step (of one more token, for cached tokens) and the most bytes of tensors it holds beyond those "
        "before it; the exponents with which both grow from the last value but one to the last (1: proportional, 0: flat). Expected: 1 in "
        "B, T and K, to 2 in T where attention's square takes over; 1 to 2 in D, whose products grow with its square and whose other "
        "work grows with itself; in cached tokens 0 where every layer is a memory layer, and up to 1 where softmax layers read all keys "
        "(`infini` has three of them above one memory layer). Small steps leave the line from above: a fixed number of calls."
    )
    figures = {axis: figures for axis, (_, figures) in found.items()}
    return Found(f"{table(HEAD, lines)}\n\n{told}", figures, ("Cost over T, B, D, K and cached tokens", figure))


def _drawn(found: dict[str, Points]) -> Figure:
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, len(found), figsize=(3 * len(found), 5))
    for column, (axis, points) in enumerate(found.items()):
        for name, by_value in points.items():
            values, (seconds, peaks) = list(by_value), zip(*by_value.values(), strict=True)
            for axes, cost in ((grid[0][column], seconds), (grid[1][column], [peak / 2**20 for peak in peaks])):
                (line,) = axes.loglog(values, cost, marker="o", label=name, base=2)
                expected = [cost[-1] * value / values[-1] for value in values]
                axes.loglog(values, expected, linestyle=":", color=line.get_color(), base=2)
        grid[1][column].set_xlabel(axis)
    grid[0][0].set_ylabel("seconds")
    grid[1][0].set_ylabel("peak MiB")
    grid[0][0].legend(title="dotted: proportional", fontsize=7, title_fontsize=7)
    figure.tight_layout()
    plt.close(figure)
    return figure
