"""One training step of the same model by plain training, Lagged Cache Training and exact sequential training."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.measure import MAX_SPREAD, machine, paired_ratio, take_turns, write
from newllm.losses.next_token import NextTokenConfig, NextTokenLoss
from newllm.models.create import create_model
from newllm.recurrence import solve, unroll
from newllm.trainers.lag import sweep_map

SHAPES = [(2, 128), (8, 128), (2, 512), (8, 512)]
VOCABULARY = 4096


def steps(batch_size: int, length: int) -> dict[str, Callable[[], object]]:
    """Return one optimizer step of each procedure, on random ids: speed does not depend on them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loss = NextTokenLoss(NextTokenConfig(kind="next_token"))
    recurrent = create_model("infini", vocab_size=VOCABULARY, seed=0, feedback="additive").to(device)
    plain = create_model("infini", vocab_size=VOCABULARY, seed=0, feedback="none").to(device)
    ids = torch.randint(VOCABULARY, (batch_size, length + 1), device=device)
    inputs, labels = ids[:, :-1], ids[:, 1:]
    cache = torch.randn(batch_size, length, recurrent.dim, device=device)

    def step(model: torch.nn.Module, states: Callable[[], torch.Tensor]) -> Callable[[], object]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

        def run() -> None:
            optimizer.zero_grad()
            loss(model, states(), labels).backward()
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    def lagged(sweeps: int) -> Callable[[], torch.Tensor]:
        return lambda: solve(sweep_map(recurrent, inputs), cache, sweeps=sweeps, differentiate=sweeps).states

    return {
        "plain": step(plain, lambda: plain.encode(inputs, plain.initial_state(batch_size)).hidden),
        "lct K=1": step(recurrent, lagged(1)),
        "lct K=2": step(recurrent, lagged(2)),
        "lct K=4": step(recurrent, lagged(4)),
        "sequential": step(recurrent, lambda: unroll(recurrent, inputs, recurrent.initial_state(batch_size))[0]),
    }


def run(rounds: int = 3) -> str:
    """Measure all shapes, write bench/results/lct_speed_<device>.json and return the table as markdown."""
    about = machine()
    lines = [
        "| B | T | plain | LCT K=1 | K=2 | K=4 | sequential | sequential / K=1 | K=1 / plain |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows_by_shape: dict[str, object] = {}
    for batch_size, length in SHAPES:
        rows = take_turns(steps(batch_size, length), rounds=rounds)
        by_name = {row.name: row for row in rows}
        loud = [f"{row.name} {row.spread:.0%}" for row in rows if row.spread > MAX_SPREAD]
        if loud:
            raise SystemExit(
                f"lct_speed: rounds at B {batch_size}, T {length} spread by {', '.join(loud)} (load before "
                f"{about['load_before']}). Allowed: at most {MAX_SPREAD:.0%}. Nothing was written; measure on a quiet machine."
            )
        ratio = paired_ratio(by_name["sequential"], by_name["lct K=1"])
        to_plain = paired_ratio(by_name["lct K=1"], by_name["plain"])
        cells = " | ".join(f"{1000 * row.median:.0f} ms" for row in rows)
        lines.append(f"| {batch_size} | {length} | {cells} | {ratio:.1f} | {to_plain:.2f} |")
        print(lines[-1], flush=True)
        rows_by_shape[f"B{batch_size}_T{length}"] = {row.name: row.seconds for row in rows} | {
            "sequential_over_lct": ratio,
            "lct_over_plain": to_plain,
        }
    name = "cuda" if torch.cuda.is_available() else "cpu"
    write(f"lct_speed_{name}", {"machine": about, "seconds_per_step": rows_by_shape})
    where = ", ".join(f"{key} {value}" for key, value in about.items())
    return "\n".join([*lines, "", f"Median of {rounds} rounds, fp32, eager. Measured on: {where}."])
