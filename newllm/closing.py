"""The last words of a run: what was learned, where the pictures are, what to do next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from newllm.run_record import last_and_best, read_metrics, read_run


def closing_lines(folder: Path, results: dict[str, Any]) -> str:
    """Return a few lines for the terminal.

    Args:
        folder: run folder.
        results: what the evaluation of the best checkpoint found, by name of the evaluation.
    """
    facts, lines = read_run(folder).facts, read_metrics(folder)
    last, _ = last_and_best(lines)
    told = []
    if "val/loss" in last:
        told.append(
            f"exact validation loss {last['val/loss']:.4f} nats per token, perplexity {last['val/perplexity']:.1f}"
        )
    if "val/bits_per_byte" in last:
        unigram = facts["data"].get("unigram_bits_per_byte")
        beside = "" if unigram is None else f" (the same tokens by frequency alone: {unigram:.3f})"
        told.append(f"{last['val/bits_per_byte']:.3f} bits per byte{beside}")
    if "val/loss_no_feedback" in last:
        told.append(
            f"feedback switched off: {last['val/loss_no_feedback']:.4f} nats; one lagged sweep from nothing: {last['val/loss_lagged']:.4f}"
        )
    if "lag/relative_error" in last:
        told.append(
            f"lag of the cached states {last['lag/relative_error']:.3f} of their size; "
            f"{last['lag/sweeps_to_tolerance']:.0f} sweeps make them exact to 1e-4"
        )
    warnings = [verdict["message"] for verdict in facts.get("guards", []) if verdict["status"] == "warning"]
    told += [f"warning: {message}" for message in warnings]
    told += [
        f"curves: {folder / 'curves.png'}    evaluated: {folder / 'evaluation.json'}"
        if results
        else f"curves: {folder / 'curves.png'}",
        f"see it:  tensorboard --logdir {folder.parent}",
        f"next:    python evaluate.py run={folder} 'evaluation=[perplexity,positions,lag,generation]'",
    ]
    return "\n".join(told)
