"""Perplexity with a sliding window, each token scored once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any

import torch
from torch import Tensor

from newllm.config.fields import Range
from newllm.config.schema import EvaluationConfig
from newllm.evaluation.material import Material
from newllm.evaluation.scoring import hidden_states, token_losses

# The exact recurrence costs about the same for one window as for so many.
WINDOWS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class SlidingWindowConfig(EvaluationConfig):
    """Window and stride."""

    window: Annotated[int | None, Range(minimum=1)]  # tokens; null takes data.block_length
    stride: Annotated[int | None, Range(minimum=1)]  # tokens; null takes a quarter of the window

    def check(self, config: Any) -> list[str]:
        """Return what is wrong between these values and the run."""
        if config.trainer.reads_in_lanes:
            return [
                f"evaluation=[sliding_window]: reads each window from an empty state, trainer={config.trainer.kind} carries it. "
                "Allowed with it: evaluation=[perplexity,positions,memory]. Leave sliding_window out of the list."
            ]
        if self.window is None or self.stride is None or self.stride <= self.window:
            return []
        return [
            f"evaluation.sliding_window.stride={self.stride}: leaves tokens out between windows of {self.window}. "
            f"Allowed: 1 to {self.window}. Lower the stride or raise evaluation.sliding_window.window."
        ]


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, first scored) of the windows over a text; every target is scored once, the first window's all.

    Args:
        length: targets of the text.
        window: tokens a window holds at most.
        stride: targets that a window scores anew, at most.
    """
    scored = 0
    while scored < length:
        end = min(window if scored == 0 else scored + stride, length)
        yield max(0, end - window), end, scored
        scored = end


def measure(material: Material, options: SlidingWindowConfig) -> dict[str, Any]:
    """Return loss and perplexity over the split as one text, each target scored once with up to a window of context.

    Args:
        material: model and text.
        options: window and stride, tokens.
    Raises:
        ValueError: the data are no running text, or the stride is longer than the window.
    Source: the protocol of the transformers documentation on perplexity of fixed-length models.
    """
    if not material.data.targets_are_next_tokens:
        raise ValueError(
            "evaluation.sliding_window: the run's blocks are no running text. Allowed: runs on text. Leave it out."
        )
    window = options.window or material.run.config.data.block_length
    stride = options.stride or max(1, window // 4)
    if stride > window:
        raise ValueError(
            f"evaluation.sliding_window.stride={stride}: leaves tokens out between windows of {window}. "
            f"Allowed: 1 to {window}. Lower the stride or set evaluation.sliding_window.window."
        )
    inputs, labels = _as_one_text(material)
    nats, count = 0.0, 0
    for (length, skipped), starts in _alike(windows(labels.shape[0], window, stride)):
        ids = torch.stack([inputs[start : start + length] for start in starts])
        targets = torch.stack([labels[start : start + length] for start in starts])
        losses, _ = token_losses(material.model, hidden_states(material.model, ids), targets)
        nats += float(losses[:, skipped:].sum())
        count += len(starts) * (length - skipped)
    loss = nats / count
    return {"window": window, "stride": stride, "loss": loss, "perplexity": math.exp(min(loss, 700)), "targets": count}


def _alike(spans: Iterable[tuple[int, int, int]]) -> Iterator[tuple[tuple[int, int], list[int]]]:
    """Group windows of one length and as many targets to skip, so that they can be scored together: (shape, starts)."""
    for shape, group in groupby(spans, key=lambda span: (span[1] - span[0], span[2] - span[0])):
        starts = [start for start, _, _ in group]
        for first in range(0, len(starts), WINDOWS_AT_ONCE):
            yield shape, starts[first : first + WINDOWS_AT_ONCE]


def _as_one_text(material: Material) -> tuple[Tensor, Tensor]:
    """Inputs and labels of the split's blocks, which follow each other without a gap: [N] each."""
    batches = list(material.batches())
    inputs = torch.cat([batch["input_ids"].flatten() for batch in batches])
    labels = torch.cat([batch["labels"].flatten() for batch in batches])
    return inputs, labels
