"""Run folders written by hand: what reports are tested on."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from newllm.run_record import last_and_best


def write_run(
    folder: Path,
    *,
    seed: int = 0,
    losses: tuple[float, ...] = (3.0, 2.0),
    status: str = "finished",
    config: dict[str, Any] | None = None,
    **facts: Any,
) -> Path:
    """Write a run whose validation losses are given, one every 10 steps."""
    folder.mkdir(parents=True)
    lines = [
        {"step": 10 * (place + 1), "tokens": 80 * (place + 1), "train/loss": loss + 0.5, "val/loss": loss}
        for place, loss in enumerate(losses)
    ]
    last, best = last_and_best(lines)
    found = {
        "seed": seed,
        "status": status,
        "started": "2026-01-01T00:00:00",
        "overrides": [f"seed={seed}"],
        "parameters": {"total": 1200},
        "flops_per_token": 5000,
        "state_bytes": 64,
        "tokens": lines[-1]["tokens"],
        "tokens_per_second": 100.0,
        "wall_seconds": 2.5,
        "guards": [],
        **facts,
    }
    if status == "finished":
        found |= {"metrics": last, "best_metrics": best}
    settings = {"name": folder.name, "seed": seed, "runtime": {"devices": seed}, **(config or {})}
    (folder / "run.json").write_text(json.dumps(found))
    (folder / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines if not _is_empty(line)))
    return folder


def write_evaluation(folder: Path, found: dict[str, Any], **of: Any) -> None:
    """Write evaluation.json as if it had been measured of the best weights on validation text, or of others."""
    measured = {"step": 10, "checkpoint": "best", "split": "validation", **of, **found}
    (folder / "evaluation.json").write_text(json.dumps(measured))


def _is_empty(line: dict[str, float]) -> bool:
    return all(math.isnan(value) for value in line.values())


def write_comparison(folder: Path, *, seeds: int = 3) -> Path:
    """Write runs of two models; the second is 0.1, 0.2, 0.3 ... nats higher, seed by seed."""
    for seed in range(seeds):
        noise = 0.5 * seed  # cancels in pairs
        for model, loss in (("infini", 2.0 + noise), ("pythia", 2.0 + noise + 0.1 * (seed + 1))):
            config = {"model": {"kind": model}}
            write_run(folder / f"{model}_{seed}", seed=seed, losses=(4.0, loss), config=config)
    return folder


def exit_code(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> Any:
    """Return how a command ends; refusals leave it as the exit of a program."""
    try:
        return main(arguments)
    except SystemExit as stopped:
        return stopped.code
