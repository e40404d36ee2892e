"""One training step of the same model by plain training, Lagged Cache Training and exact sequential training."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench.measure import DEVICE, Found, Row, paired_ratio, require_quiet, table, take_turns, timed
from bench.steps import bare_step, exact_loss, lagged_loss, parallel_loss, random_ids
from newllm.models.create import create_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# From the cheapest exact step to the dearest: those behind the time limit are left out, and named.
SHAPES = [
    (1, 128),
    (2, 128),
    (8, 128),
    (32, 128),
    (64, 128),
    (1, 512),
    (2, 512),
    (8, 512),
    (32, 512),
    (2, 2048),
    (8, 2048),
]
VOCABULARY = 4096
TIME_LIMIT_SECONDS = 150
# An exact step longer than this is measured in two rounds, after one as warm-up.
LONG_SECONDS = 3


def steps(batch_size: int, length: int) -> dict[str, Callable[[], object]]:
    """Return one optimizer step of each procedure, on random ids: speed does not depend on them."""
    inputs, labels = random_ids(batch_size, length, VOCABULARY)
    recurrent = create_model("infini", vocab_size=VOCABULARY, seed=0, feedback="additive").to(DEVICE)
    plain = create_model("infini", vocab_size=VOCABULARY, seed=0, feedback="none").to(DEVICE)
    found = {"plain": bare_step(plain, parallel_loss(plain, inputs, labels))}
    for sweeps in (1, 2, 4):
        found[f"lct K={sweeps}"] = bare_step(recurrent, lagged_loss(recurrent, inputs, labels, sweeps=sweeps))
    return {**found, "sequential": bare_step(recurrent, exact_loss(recurrent, inputs, labels))}


def measured(batch_size: int, length: int, rounds: int) -> list[Row]:
    """Return the rows of a shape; long exact steps take fewer rounds."""
    calls = steps(batch_size, length)
    exact = calls.pop("sequential")
    first = timed(exact)
    if first <= LONG_SECONDS:
        return take_turns({**calls, "sequential": exact}, rounds=rounds)
    rows = take_turns(calls, rounds=2)
    return [*rows, Row("sequential", [timed(exact) for _ in range(2)], first)]


def run(quick: bool) -> Found:
    """Measure the shapes that the time allows."""
    started, lines, left_out = time.monotonic(), [], []
    figures: dict[str, Any] = {}
    ratios: dict[int, dict[int, float]] = {}
    expected = 0.0
    for batch_size, length in [(1, 16), (2, 16)] if quick else SHAPES:
        before = time.monotonic()
        if before - started + expected > TIME_LIMIT_SECONDS:
            left_out.append(f"B {batch_size}, T {length}")
            continue
        rows = measured(batch_size, length, rounds=2 if quick else 3)
        # The next shape has up to four times the tokens of this one.
        expected = 2 * (time.monotonic() - before)
        if not quick:
            require_quiet(rows, f"lct_speed, B {batch_size}, T {length}")
        by_name = {row.name: row for row in rows}
        ratio = paired_ratio(by_name["sequential"], by_name["lct K=1"])
        to_plain = paired_ratio(by_name["plain"], by_name["lct K=1"])
        lines.append(
            [batch_size, length, *[f"{1000 * row.median:.0f} ms" for row in rows], f"{ratio:.1f}", f"{to_plain:.2f}"]
        )
        print(*lines[-1], sep=" | ", flush=True)
        ratios.setdefault(length, {})[batch_size] = ratio
        figures[f"B{batch_size}_T{length}"] = {row.name: row.figures() for row in rows} | {
            "sequential_over_lct": ratio,
            "plain_over_lct": to_plain,
        }
    head = ["B", "T", "plain", "LCT K=1", "K=2", "K=4", "sequential", "sequential / K=1", "plain / K=1"]
    told = (
        "Infini stack of nano size, fp32, eager; gradients, clipping and AdamW included, for LCT also fetching the states of the last "
        "visit from a cache in RAM (bf16) and putting back the new ones. The sequential reference steps with cached "
        "keys and values, which it appends to for every token."
    )
    if left_out:
        told += f" Left out, more than {TIME_LIMIT_SECONDS} s: {'; '.join(left_out)}."
    return Found(f"{table(head, lines)}\n\n{told}", figures, ("Ratio over batch and length", _drawn(ratios)))


def _drawn(ratios: dict[int, dict[int, float]]) -> Figure:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5))
    for length, by_batch in ratios.items():
        axes.plot(list(by_batch), list(by_batch.values()), marker="o", label=f"T {length}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="B, texts in a batch", ylabel="exact step / LCT step", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    plt.close(figure)
    return figure
