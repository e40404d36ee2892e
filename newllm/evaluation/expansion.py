"""Loss against the share of positions that read fine memories, for a range of thresholds: does the gate of kind hierarchical save work?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from newllm.config.fields import Count, Range
from newllm.config.schema import EvaluationConfig
from newllm.evaluation.material import Material
from newllm.evaluation.scoring import Score, score_states
from newllm.layers.hierarchical import HierarchicalLayer
from newllm.layers.telemetry import memory_telemetry
from newllm.models.base import LanguageModel
from newllm.streaming import begin, read_block


@dataclass(frozen=True, kw_only=True)
class ExpansionConfig(EvaluationConfig):
    """Which thresholds are tried, on how much text.

    Attributes:
        thresholds: expansions below which a position reads the coarse memory only.
        batches: of the split, at most, from its start.
    """

    thresholds: list[Annotated[float, Range(minimum=0, maximum=1)]]
    batches: Count

    def check(self, config: Any) -> list[str]:
        """Return what is wrong between the measurement and the model."""
        problems = []
        if not self.thresholds:
            problems.append(
                "evaluation.expansion.thresholds=[]: leaves nothing to measure. Allowed: at least one number from 0 to 1. "
                "Give some."
            )
        stack = getattr(getattr(config, "layers", None), "stack", ())
        if "hierarchical" not in stack:
            problems.append(
                f"evaluation=[expansion]: measures a gate between memories, layers.stack={list(stack)} has none. "
                "Allowed with it: stacks with a layer of kind hierarchical. Leave expansion out of the list."
            )
        return problems


def measure(material: Material, options: ExpansionConfig) -> dict[str, Any]:
    """Return for every threshold what is lost and what is saved.

    Args:
        material: model and text; a run in lanes carries its memories from block to block.
        options: thresholds and batches.
    Returns:
        `by_threshold`: `loss` (nats per token), `perplexity`, `expanded_share` (of the positions), `expansion_mean` (before the
        threshold), and `flops_per_token` that the stack's matrix products really took, without the head. Rows of a batch are read
        side by side: a segment costs what its row with the most expanded positions does. `targets` of each threshold.
    """
    lines, targets = [], 0
    for threshold in options.thresholds:
        with expanding_from(material.model, threshold):
            score, facts = _read(material, options.batches)
        metrics = score.metrics()
        lines.append({"threshold": threshold, "loss": metrics["loss"], "perplexity": metrics["perplexity"], **facts})
        targets = score.tokens
    return {"by_threshold": lines, "targets": targets}


@contextmanager
def expanding_from(model: LanguageModel, threshold: float) -> Iterator[None]:
    """Let positions whose expansion is below the threshold read coarse memories only, within the context."""
    layers = [layer for layer in model.modules() if isinstance(layer, HierarchicalLayer)]
    own = [layer.expand_threshold for layer in layers]
    try:
        for layer in layers:
            layer.expand_threshold = threshold
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            layer.expand_threshold = before


@torch.no_grad()
def _read(material: Material, batches: int) -> tuple[Score, dict[str, float]]:
    """The score of the batches, and what reading them took, mean over positions."""
    model, state, score = material.model, None, Score(0.0, 0, 0, 0)
    context_tokens = getattr(material.run.config.trainer, "context_tokens", 0)
    sums, positions = {"expanded_share": 0.0, "expansion_mean": 0.0, "flops_per_token": 0.0}, 0
    for batch in islice(material.batches(), batches):
        input_ids = batch["input_ids"]
        before = begin(model, state if material.data.in_lanes else None, batch)
        with FlopCounterMode(display=False) as counter:
            output = read_block(model, before, input_ids, context_tokens=context_tokens)
        state = output.state
        score += score_states(model, output.hidden, batch["labels"], material.data.token_bytes)
        told = memory_telemetry(model, input_ids, before)
        for name in ("expanded_share", "expansion_mean"):
            sums[name] += input_ids.numel() * told[f"memory/{name}"]
        sums["flops_per_token"] += counter.get_total_flops()
        positions += input_ids.numel()
    return score, {name: total / positions for name, total in sums.items()}
