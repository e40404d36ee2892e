"""How far lagged states are from exact ones, and what the lag does to the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from newllm.models.base import LanguageModel
from newllm.recurrence import relative_change, solve, unroll


def sweep_map(model: LanguageModel, input_ids: Tensor, state: Any = None, **options: Any) -> Any:
    """Return the map F of a feedback model on a batch: previous states [B, T, D] -> states [B, T, D]."""
    start = model.initial_state(input_ids.shape[0]) if state is None else state
    return lambda previous: model.encode(input_ids, start, previous_hidden=previous, **options).hidden


@torch.no_grad()
def lag_statistics(
    model: LanguageModel, input_ids: Tensor, cached: Tensor, *, tolerance: float = 1e-4
) -> dict[str, Any]:
    """Return how far cached states are from the exact ones under the present weights.

    Args:
        model: a feedback model.
        input_ids: tokens [B, T].
        cached: states of the last visit [B, T, D].
        tolerance: relative change at which sweeps from the cache are called settled, unitless.
    Returns:
        `relative_error` |C - h|/|h| over everything, `relative_error_max` over positions, `relative_error_by_position` [T],
        `sweeps_to_tolerance` from the cached states, `contraction` of those sweeps (None where too few were needed).
    """
    exact, _ = unroll(model, input_ids, model.initial_state(input_ids.shape[0]))
    by_position = (cached - exact).norm(dim=(0, 2)) / exact.norm(dim=(0, 2)).clamp_min(1e-30)
    solution = solve(
        sweep_map(model, input_ids), cached, sweeps=input_ids.shape[1], tolerance=tolerance, statistics=True
    )
    return {
        "relative_error": relative_change(exact, cached),
        "relative_error_max": by_position.max().item(),
        "relative_error_by_position": by_position,
        "sweeps_to_tolerance": solution.sweeps,
        "contraction": solution.contraction,
    }


def gradient_cosine(
    model: LanguageModel,
    loss: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    cached: Tensor,
    *,
    sweeps: int,
    reference: int,
) -> float:
    """Return the cosine between the parameter gradients of `sweeps` and of `reference` differentiated sweeps, unitless.

    The parameters' own gradients are left as they are.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradient(count: int) -> Tensor:
        with torch.enable_grad():
            states = solve(sweep_map(model, input_ids), cached, sweeps=count, differentiate=count).states
            parts = torch.autograd.grad(loss(model, states, labels), parameters, allow_unused=True)
        return torch.cat([part.flatten() for part in parts if part is not None])

    return nn.functional.cosine_similarity(gradient(sweeps), gradient(reference), dim=0).item()
