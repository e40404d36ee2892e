"""How far lagged states are from the exact ones."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any

import torch

from newllm.config.fields import Count, Range
from newllm.config.schema import EvaluationConfig
from newllm.evaluation.material import Material
from newllm.evaluation.scoring import Score, hidden_states, score_batch
from newllm.recurrence import relative_change, solve
from newllm.trainers.lag import sweep_map


@dataclass(frozen=True, kw_only=True)
class LagConfig(EvaluationConfig):
    """How many sweeps are tried, on how much text."""

    batches: Count
    max_sweeps: Count
    tolerance: Annotated[float, Range(above=0)]  # relative change of the states per sweep

    def check(self, config: Any) -> list[str]:
        """Return what is wrong with this measurement on that run."""
        if config.trainer.reads_in_lanes:
            return [
                f"evaluation.lag: sweeps each block from an empty state, trainer={config.trainer.kind} carries it. "
                "Allowed with it: evaluation=[perplexity,positions,memory]. Take lag out of evaluation."
            ]
        if config.model.has_feedback:
            return []
        return [
            "evaluation.lag: measures a recurrence, the model has none (model.feedback=none). "
            "Allowed: models with model.feedback=additive or gated. Take lag out of evaluation or train with trainer=lct."
        ]


def measure(material: Material, options: LagConfig) -> dict[str, Any]:
    """Return how far sweeps from nothing are from the exact recurrence, and what that costs in loss.

    Args:
        material: model with feedback, and text.
        options: batches, most sweeps, tolerance.
    Returns:
        `relative_error` after 1, 2, 4 ... sweeps from zeros (|lagged - exact| / |exact|), `sweeps_to_tolerance` (the most of any
        batch; None where one had not settled after `max_sweeps`), `contraction` (mean over batches), and the losses, nats per
        token: `loss_exact`, `loss_lagged` (one sweep from zeros) and `loss_no_feedback` on the same batches.
    """
    errors: dict[int, list[float]] = {}
    sweeps, contractions, have_settled = [], [], []
    scores: dict[str, Score] = {}
    for batch in islice(material.batches(), options.batches):
        input_ids = batch["input_ids"]
        exact = hidden_states(material.model, input_ids)
        step = sweep_map(material.model, input_ids)
        with torch.inference_mode():
            count = 1
            while count <= min(options.max_sweeps, input_ids.shape[1]):
                lagged = solve(step, torch.zeros_like(exact), sweeps=count).states
                errors.setdefault(count, []).append(relative_change(exact, lagged))
                count *= 2
            limit = min(options.max_sweeps, input_ids.shape[1])
            solution = solve(step, torch.zeros_like(exact), sweeps=limit, tolerance=options.tolerance, statistics=True)
        sweeps.append(solution.sweeps)
        # As many sweeps as positions are exact, whatever the last one changed.
        have_settled.append(solution.residuals[-1] <= options.tolerance or solution.sweeps == input_ids.shape[1])
        contractions += [] if solution.contraction is None else [solution.contraction]
        for mode in ("exact", "lagged", "no_feedback"):
            score = score_batch(material.model, batch, material.data.token_bytes, mode=mode)
            scores[mode] = scores[mode] + score if mode in scores else score
    return {
        "relative_error": {str(count): sum(values) / len(values) for count, values in errors.items()},
        "sweeps_to_tolerance": max(sweeps) if all(have_settled) else None,
        "contraction": sum(contractions) / len(contractions) if contractions else None,
        **{f"loss_{mode}": score.metrics()["loss"] for mode, score in scores.items()},
    }
