"""The last words of a run: what was learned, where the pictures are, what to do next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from newllm.config.compose import compose
from newllm.config.schema import TrainConfig
from newllm.report.phase1 import contexts_of
from newllm.run_record import last_and_best, read_metrics, read_run

WORTH_A_LOOK = ("perplexity", "positions", "lag", "generation")  # evaluations that need no choice of the user


def _memory_lines(last: dict[str, float], results: dict[str, Any]) -> list[str]:
    """What the memory is worth, of runs that have measured it: losses in nats of texts, answers of probes."""
    told = []
    if "val/loss_memory_off" in last:
        told.append(f"memory on: {last['val/loss']:.4f} nats, off: {last['val/loss_memory_off']:.4f}")
        if "val/loss_other_memory" in last:
            told[-1] += (
                f"; another text's: {last['val/loss_other_memory']:.4f}, on where there was one "
                f"({last['val/other_memory_share']:.1%} of the targets): {last['val/loss_own_memory']:.4f}"
            )
    elif "loss_memory_off" in (texts := results.get("memory", {}).get("all", {})):
        told.append(f"memory on: {texts['loss']:.4f} nats over whole texts, off: {texts['loss_memory_off']:.4f}")
    recall = results.get("recall", {})
    if "memory_off" in recall:
        on, off, other = (found["accuracy"] for found in (recall, recall["memory_off"], recall["other_memory"]))
        beside = "" if other is None else f", another text's: {other:.3f}"
        told.append(
            f"answers right, memory on: {on:.3f}, off: {off:.3f}{beside} "
            f"(guessing: {recall['chance_accuracy']:.3f}; state {recall['state_bytes']:,} bytes)"
        )
    return told


def _context_lines(facts: dict[str, Any]) -> list[str]:
    """What contexts came to, of runs that learn them by themselves."""
    return [
        f"{split} contexts, swept clean: converged {found['converged_share']}, effective rank {found['effective_rank']['uncentred']}"
        for split, found in contexts_of(facts).items()
    ]


def _next_evaluations(config: TrainConfig) -> str:
    """Those worth a look that this run allows, as evaluate.py would check them."""
    if config.trainer.kind == "cvfp_phase1":
        return "contexts"  # the token block is as it was drawn: what it predicts is no result
    offered = compose(["run=.", f"evaluation=[{','.join(WORTH_A_LOOK)}]"], root="evaluate").evaluation
    return ",".join(name for name in WORTH_A_LOOK if not offered[name].check(config))


def closing_lines(config: TrainConfig, folder: Path, results: dict[str, Any]) -> str:
    """Return a few lines for the terminal.

    Args:
        config: of the run.
        folder: run folder.
        results: what the evaluation of the best checkpoint found, by name of the evaluation.
    """
    facts, lines = read_run(folder).facts, read_metrics(folder)
    last, _ = last_and_best(lines)
    told = _context_lines(facts)
    if "val/loss" in last:
        told.append(
            f"exact validation loss {last['val/loss']:.4f} nats per token, perplexity {last['val/perplexity']:.1f}"
        )
    if "val/bits_per_byte" in last:
        unigram = facts["data"].get("unigram_bits_per_byte")
        beside = "" if unigram is None else f" (the same tokens by frequency alone: {unigram:.3f})"
        told.append(f"{last['val/bits_per_byte']:.3f} bits per byte{beside}")
    elif (why_not := facts["data"].get("why_no_bits_per_byte")) is not None:
        told.append(f"no bits per byte: {why_not}")
    if "val/loss_no_feedback" in last:
        told.append(
            f"feedback switched off: {last['val/loss_no_feedback']:.4f} nats; one lagged sweep from nothing: {last['val/loss_lagged']:.4f}"
        )
    told += _memory_lines(last, results)
    if "lag/relative_error" in last:
        # Measured every so many steps: the weights of the end may need more sweeps, or fewer.
        step = next(line["step"] for line in reversed(lines) if "lag/relative_error" in line)
        newton = last.get("lag/newton_to_tolerance")
        told.append(
            f"lag of the cached states at step {step}: {last['lag/relative_error']:.3f} of their size; "
            f"{last['lag/sweeps_to_tolerance']:.0f} sweeps{'' if newton is None else f' or {newton:.0f} Newton steps'} "
            "make them exact to 1e-4"
        )
    warnings = [verdict["message"] for verdict in facts.get("guards", []) if verdict["status"] == "warning"]
    told += [f"warning: {message}" for message in warnings]
    told += [
        f"curves: {folder / 'curves.png'}    evaluated: {folder / 'evaluation.json'}"
        if results
        else f"curves: {folder / 'curves.png'}",
        f"see it:  tensorboard --logdir {shlex.quote(str(folder.parent))}",
    ]
    if (folder / "checkpoints" / "best.ckpt").is_file():
        evaluations = _next_evaluations(config)
        told.append(f"next:    python evaluate.py {shlex.quote(f'run={folder}')} 'evaluation=[{evaluations}]'")
    return "\n".join(told)
