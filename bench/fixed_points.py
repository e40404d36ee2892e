"""Sweeps of a recurrence beside torchdeq's fixed-point solver: the same map, start and number of iterations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.measure import DEVICE, Found, paired_ratio, require_quiet, table, take_turns
from bench.peers import import_peer, missing, problem_with, version_of
from bench.steps import random_ids
from newllm.models.create import create_model
from newllm.recurrence import Map, shift, solve
from newllm.trainers.lag import sweep_map

SHAPES = [(8, 128), (2, 512)]
SWEEPS = 8


def torchdeq(solver: str, step: Map, start: Tensor) -> Callable[[], Tensor]:
    """Return a call that makes as many iterations of the same map with a solver of torchdeq."""
    iterate = getattr(import_peer("torchdeq.solver.fp_iter"), solver)

    @torch.no_grad()
    def call() -> Tensor:
        # tau damps: 1 takes each new value whole, as a sweep does. What a tolerance of zero never ends is not ended early.
        return iterate(lambda states, tau=1.0: step(shift(states)), start, max_iter=SWEEPS, tol=0.0)[0]

    return call


def run(quick: bool) -> Found:
    """Measure without gradient: what a warm start, a lag probe or a context cache costs."""
    lines: list[list[object]] = []
    figures: dict[str, Any] = {}
    for batch_size, length in [(2, 16)] if quick else SHAPES:
        model = create_model("infini", vocab_size=4096, seed=0, feedback="additive").to(DEVICE).eval()
        torch.nn.init.normal_(model.feedback.projection.weight, std=0.002)  # type: ignore[union-attr,arg-type]
        inputs, _ = random_ids(batch_size, length, 4096)
        step, start = sweep_map(model, inputs), torch.zeros(batch_size, length, model.dim, device=DEVICE)
        own: Callable[[], Tensor] = lambda f=step, s=start: solve(f, s, sweeps=SWEEPS).states  # noqa: E731
        calls: dict[str, Callable[[], object]] = {"ours": own}
        agree = ""
        if problem_with("torchdeq") is None:
            simple = calls["torchdeq, simple"] = torchdeq("simple_fixed_point_iter", step, start)
            calls["torchdeq, with statistics"] = torchdeq("fixed_point_iter", step, start)
            difference = (own() - simple()).norm() / own().norm()
            agree = f"{difference.item():.1e}"
        rows = take_turns(calls, rounds=2 if quick else 7)
        if not quick:
            require_quiet(rows, f"fixed_points, B {batch_size}, T {length}")
        for row in rows:
            cost = f"{1000 * row.median:.1f} ms"
            lines.append([batch_size, length, row.name, cost, f"{paired_ratio(row, rows[0]):.2f}", agree])
            print(*lines[-1], sep=" | ", flush=True)
        figures[f"B{batch_size}_T{length}"] = {row.name: row.figures() for row in rows}
    told = f"{SWEEPS} iterations from zeros of an Infini stack of nano size, without gradient, fp32."
    if problem_with("torchdeq") is None:
        told += f" torchdeq {version_of('torchdeq')}."
    head = ["B", "T", "", "duration", "time / ours", "difference of states"]
    return Found(f"{table(head, lines)}\n\n{told}{missing(['torchdeq'])}", figures)
