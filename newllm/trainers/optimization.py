"""Optimizer groups and the learning rate over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from newllm.config.schema import OptimizerConfig, ScheduleConfig


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict]:
    """Return AdamW groups: matrices are decayed, vectors are not, gates learn faster and are not decayed.

    A gate is a parameter whose own name contains `gate`. At the common rate gates stay where they start.
    """
    groups: dict[str, list[nn.Parameter]] = {"decayed": [], "plain": [], "gates": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "gate" in name.rpartition(".")[2]:
            groups["gates"].append(parameter)
        else:
            groups["decayed" if parameter.dim() >= 2 else "plain"].append(parameter)
    options = {
        "decayed": {"lr": config.lr, "weight_decay": config.weight_decay},
        "plain": {"lr": config.lr, "weight_decay": 0.0},
        "gates": {"lr": config.lr * config.gate_lr_factor, "weight_decay": 0.0},
    }
    return [{"params": group, "name": name, **options[name]} for name, group in groups.items() if group]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return AdamW, fused: one kernel for all tensors of a group."""
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(parameter_groups(model, config), lr=config.lr, betas=betas, eps=config.eps, fused=True)


def learning_rate_factor(config: ScheduleConfig, max_steps: int) -> Callable[[int], float]:
    """Return the function from optimizer steps made to the share of the highest learning rate.

    Args:
        config: `constant`, `cosine` down to `min_lr_ratio`, or `wsd`: constant, then linear down over the last `decay_share`.
        max_steps: optimizer steps of the whole run.
    """

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.kind == "constant":
            return 1.0
        decay_start = config.warmup_steps
        if config.kind == "wsd":
            decay_start = max(decay_start, round(max_steps * (1 - config.decay_share)))
        progress = min(max(step - decay_start, 0) / max(max_steps - decay_start, 1), 1.0)
        remaining = 1 - progress if config.kind == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining

    return factor
