"""Loss against mean steps of a model with learned halting, for a range of thresholds: to be compared with fixed steps at equal means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast

import numpy as np
import torch
from torch import Tensor

from newllm.config.fields import Range
from newllm.config.schema import EvaluationConfig
from newllm.evaluation.material import Material
from newllm.evaluation.scoring import token_losses
from newllm.losses.halting import halting_log_shares
from newllm.losses.next_token import NO_TARGET
from newllm.models.selective import SelectiveLM


@dataclass(frozen=True, kw_only=True)
class HaltingConfig(EvaluationConfig):
    """Which thresholds are tried."""

    quantiles: list[Annotated[float, Range(minimum=0, maximum=1)]]  # shares of the text's gates below a threshold

    def check(self, config: Any) -> list[str]:
        """Return what is wrong between the measurement and the model."""
        problems = []
        if not self.quantiles:
            problems.append(
                "evaluation.halting.quantiles=[]: leaves nothing to measure. Allowed: at least one number from 0 to 1. "
                "Give some."
            )
        if getattr(config.model, "halting", "fixed") != "learned":
            problems.append(
                f"evaluation=[halting]: measures a gate, a model of kind {config.model.kind} without learned halting has none. "
                "Allowed with it: model=selective model.halting=learned. Leave halting out of the list."
            )
        return problems


@torch.inference_mode()
def measure(material: Material, options: HaltingConfig) -> dict[str, Any]:
    """Return loss (nats per token), perplexity and mean steps per token of every threshold, and of the shares trained on.

    Gates keep near each other wherever a prior holds them: thresholds are taken from the gates of the text itself, at the same shares
    of them for every model.

    Args:
        material: model and text.
        options: thresholds, as quantiles.
    """
    model = cast(SelectiveLM, material.model)
    thresholds = _thresholds(material, model, options.quantiles)
    nats, steps, targets = torch.zeros(len(thresholds) + 1).double(), torch.zeros(len(thresholds) + 1).double(), 0
    for batch in material.batches():
        levels, labels = _levels(model, batch), batch["labels"]
        every = torch.stack([token_losses(model, level, labels)[0] for level in levels.unbind(2)], dim=2)  # [B, T, s]
        shares = halting_log_shares(model.halting_logits(levels)).exp().double()
        chosen = [model.emitting_step(levels, threshold) for threshold in thresholds]
        weights = [torch.nn.functional.one_hot(step, model.skip_interval).double() for step in chosen]
        places = torch.arange(1, model.skip_interval + 1, device=levels.device).double()
        is_target = labels != NO_TARGET
        for index, weight in enumerate([shares, *weights]):
            nats[index] += (weight * every).sum(-1)[is_target].sum().cpu()
            steps[index] += (weight @ places)[is_target].sum().cpu()
        targets += int(is_target.sum())
    lines = [
        {"mean_steps": step / targets, "loss": nat / targets, "perplexity": math.exp(min(nat / targets, 700))}
        for nat, step in zip(nats.tolist(), steps.tolist(), strict=True)
    ]
    by_threshold = [
        {"quantile": quantile, "threshold": threshold, **line}
        for quantile, threshold, line in zip(options.quantiles, thresholds, lines[1:], strict=True)
    ]
    return {"weighted": lines[0], "by_threshold": by_threshold, "targets": targets}


def _levels(model: SelectiveLM, batch: Mapping[str, Tensor]) -> Tensor:
    """Hidden states of every step [B, T, s, D]."""
    return model.encode(batch["input_ids"], model.initial_state(batch["input_ids"].shape[0])).levels


def _thresholds(material: Material, model: SelectiveLM, quantiles: Sequence[float]) -> list[float]:
    """Quantiles of the gates at all targets; at 0 and 1 the thresholds that always and never let the first step emit."""
    gates = [
        model.halting_logits(_levels(model, batch)).sigmoid()[batch["labels"] != NO_TARGET].flatten().float().cpu()
        for batch in material.batches()
    ]
    inner = np.quantile(torch.cat(gates).numpy(), quantiles)
    return [quantile if quantile in (0, 1) else float(gate) for quantile, gate in zip(quantiles, inner, strict=True)]
