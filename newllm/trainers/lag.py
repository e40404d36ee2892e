"""How far lagged states are from exact ones, and what the lag does to the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from newllm.models.base import LanguageModel
from newllm.recurrence import Map, Solver, relative_change, solve, sweep, unroll


def sweep_map(model: LanguageModel, input_ids: Tensor, state: Any = None, **options: Any) -> Any:
    """Return the map F of a feedback model on a batch: previous states [B, T, D] -> states [B, T, D]."""
    start = model.initial_state(input_ids.shape[0]) if state is None else state
    return lambda previous: model.encode(input_ids, start, previous_hidden=previous, **options).hidden


def trained_states(
    model: LanguageModel, input_ids: Tensor, lagged: Tensor, *, sweeps: int, solver: Solver = "sweeps"
) -> Tensor:
    """Return the states that a step of Lagged Cache Training learns from [B, T, D], with its gradient.

    Args:
        model: a feedback model, pointwise for Newton steps.
        input_ids: tokens [B, T].
        lagged: states to start from [B, T, D].
        sweeps: differentiated sweeps; or Newton steps of what the next position reads, of which the last is differentiated, and
            one sweep from there.
        solver: which of them.
    """
    step = sweep_map(model, input_ids)
    if solver == "sweeps":
        return solve(step, lagged, sweeps=sweeps, differentiate=sweeps).states
    carried = solve(
        carried_map(model, input_ids), lagged[..., : model.carried_dim], sweeps=sweeps, solver=solver, differentiate=1
    )
    return sweep(step, carried.states)


def carried_map(model: LanguageModel, input_ids: Tensor) -> Map:
    """Return the map F restricted to what the next position reads: [B, T, C] -> [B, T, C]."""
    step = sweep_map(model, input_ids)
    return lambda previous: step(previous)[..., : model.carried_dim]


@torch.no_grad()
def newton_to_tolerance(step: Map, start: Tensor, *, most: int, tolerance: float) -> int | None:
    """Return the Newton steps after which states change by no more than the tolerance; None where `most` of them do not do.

    Args:
        step: pointwise map, of a model `carried_map`.
        start: states [B, T, C].
        most: steps that are tried.
        tolerance: relative change, unitless; the step that finds no more of it counts.
    """
    found = solve(step, start, sweeps=most, tolerance=tolerance, solver="newton")
    # As many steps as positions are exact, whatever the last one changed.
    has_settled = found.residuals[-1] <= tolerance or found.sweeps == start.shape[1]
    return found.sweeps if has_settled else None


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
    solver: Solver = "sweeps",
) -> float:
    """Return the cosine between the parameter gradients of `sweeps` and of `reference` sweeps or Newton steps, unitless.

    The parameters' own gradients are left as they are.
    """

    def gradient(count: int) -> Tensor:
        with torch.enable_grad():
            states = trained_states(model, input_ids, cached, sweeps=count, solver=solver)
            return flat_gradient(model, loss(model, states, labels))

    return nn.functional.cosine_similarity(gradient(sweeps), gradient(reference), dim=0).item()


def flat_gradient(model: nn.Module, loss: Tensor) -> Tensor:
    """Return the gradient of a loss by all trained parameters that it reaches, as one vector; their own gradients are left as they are."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None])
