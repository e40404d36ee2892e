"""What a run proves before step 0, on its own model and batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from newllm.config.schema import GuardsConfig
from newllm.guards.data_checks import check_splits, check_targets, check_unseen
from newllm.guards.model_checks import (
    check_causality,
    check_finite,
    check_initial_loss,
    check_repeatable,
    check_rows,
    check_sweep_causality,
    check_tied_weights,
    check_trained_is_evaluated,
)
from newllm.guards.probe import build_probe, untouched
from newllm.guards.verdict import Verdict
from newllm.models.base import LanguageModel

if TYPE_CHECKING:
    from newllm.data.module import TextDataModule
    from newllm.data.tokenizer import Tokenizer


def _timed(check: Callable[[], Verdict]) -> Verdict:
    start = time.perf_counter()
    verdict = check()
    return replace(verdict, figures={**verdict.figures, "seconds": round(time.perf_counter() - start, 3)})


def run_preflight(
    model: LanguageModel,
    batch: dict[str, Tensor],
    data: TextDataModule,
    tokenizer: Tokenizer | None,
    guards: GuardsConfig,
    seed: int,
    *,
    is_fresh: bool = True,
) -> list[Verdict]:
    """Return what all checks before step 0 found; `require_passed` then stops a run that failed one.

    Args:
        model: as it will be trained, on its device.
        batch: first training batch: input_ids and labels [B, T].
        data: the prepared data module.
        tokenizer: decodes an example at debug level; None where there is no text.
        guards: how many positions, which range of the first loss.
        seed: decides positions and changed tokens; no global random state is read or moved.
        is_fresh: the weights are random; False for a resumed or pretrained model, of which no first loss is expected.
    Returns:
        One verdict per check, each with the seconds it took.
    """
    generator = torch.Generator().manual_seed(seed)
    count = guards.causality_positions
    verdicts = [
        _timed(lambda: check_targets(batch, data, tokenizer)),
        _timed(lambda: check_splits(data)),
        _timed(lambda: check_unseen(data)),
        _timed(lambda: check_tied_weights(model)),
    ]
    with untouched(model):
        probe = build_probe(model, batch["input_ids"], generator)
        verdicts.append(_timed(lambda: check_finite(probe)))
        checks: dict[str, Callable[[], Verdict]] = {
            "causality": lambda: check_causality(probe, count, generator),
            "sweep_causality": lambda: check_sweep_causality(probe, count, generator),
            "rows": lambda: check_rows(probe, generator),
            "repeatable": lambda: check_repeatable(probe),
            "trained_is_evaluated": lambda: check_trained_is_evaluated(probe, generator),
            "initial_loss": lambda: check_initial_loss(
                model, batch, guards.initial_loss_low, guards.initial_loss_high, is_fresh=is_fresh
            ),
        }
        if verdicts[-1].status == "failed":
            # NaN differs from itself: all of these would fail for that reason alone.
            return verdicts + [Verdict(name, "not applicable", "The logits are not finite.") for name in checks]
        return verdicts + [_timed(check) for check in checks.values()]
