"""The one place that runs a recurrence: one lagged sweep, K sweeps, sweeps to a tolerance, Newton steps, or exactly, position by position.

A recurrent model is a causal map F from previous states [B, T, D] to states [B, T, D], parallel over positions: row t of the result
depends on rows <= t of its argument. A sweep applies F to the states of the sweep before, moved by one position (a Jacobi
iteration); from any start it becomes exact from the left, one position per sweep. Lagged Cache Training is one sweep from the states
of the last visit; a CVFP iteration is one sweep with a loss on how far the states moved; deployment runs `unroll`.
Where row t depends on row t of the argument alone, the map is pointwise, and Newton's iteration may take the place of the sweeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from newllm.linear_recurrence import linear_recurrence

Solver = Literal["sweeps", "newton"]
DAMPING = (0.0, 0.3, 0.5, 0.7, 1.0)  # shares of the Jacobian that a Newton step may take; with none it is a sweep
Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """States that `solve` returns, and how it got there.

    Attributes:
        states: [B, T, D], with gradient through the last `differentiate` sweeps.
        sweeps: sweeps or Newton steps made.
        residuals: |new - old| / |new| at each of them, unitless; empty unless statistics were asked for.
        contraction: geometric mean of successive residual ratios, unitless; None before three sweeps. Below 1 the sweeps converge.
    """

    states: Tensor
    sweeps: int
    residuals: tuple[float, ...]
    contraction: float | None


class Recurrent(Protocol):
    """What `unroll` needs of a model."""

    def encode(
        self, input_ids: Tensor, state: Any, *, previous_hidden: Tensor | None = None, update_memory: bool = True
    ) -> Any: ...


def shift(states_BTD: Tensor, first_BD: Tensor | None = None) -> Tensor:
    """Return for every position the state of the one before it; position 0 gets `first_BD`, or zeros.

    Args:
        states_BTD: states [B, T, D].
        first_BD: state before position 0, [B, D].
    Returns:
        Previous states [B, T, D].
    """
    if first_BD is None:
        first_BD = torch.zeros_like(states_BTD[:, 0])
    return torch.cat([first_BD.unsqueeze(1), states_BTD[:, :-1]], dim=1)


def sweep(step: Map, states_BTD: Tensor, first_BD: Tensor | None = None) -> Tensor:
    """Return the map applied once to all positions, each reading the given state of the position before it.

    If the given states are exact at positions < k, the result is exact at positions <= k.
    """
    return step(shift(states_BTD, first_BD))


def newton(step: Map, states_BTD: Tensor, first_BD: Tensor | None = None) -> Tensor:
    """Return the states after one Newton step for h = F(Sh), S the shift: h + (I - cJS)^-1 (F(Sh) - h), J the Jacobian of F at Sh.

    What a position changes is told to all after it at once, by a linear recurrence, where a sweep tells the next one: near the
    solution, where c = 1, the error is squared. Far from it the product of many J may be anything; c is then what each text stands,
    down to 0, which is a sweep. Either makes one more position exact. The gradient takes J, c and h for constants. With c = 1 it is
    that of back-propagation through time over the whole length at the given states, and exact where they are exact.

    Takes two applications of the map, D ways back through it, and D values for each value of the states.

    Args:
        step: map [B, T, D] -> [B, T, D], pointwise: of any other, what positions do to each other would be left out unseen.
        states_BTD: given states; no gradient reaches them.
        first_BD: state before position 0; gradient reaches it.
    Source: DEER (Lim et al., 2024); Gonzalez et al. (2024) on steps that are too long.
    """
    given = states_BTD.detach()
    previous = shift(given, first_BD)
    with torch.enable_grad():
        read = previous.detach().requires_grad_()
        changes = jacobians(step(read), read)
    swept = step(previous)
    # Autocast would round what is told from position to position each time.
    with torch.autocast(given.device.type, enabled=False):
        damping = _damping(changes, given, swept.detach())
        return given + linear_recurrence(changes, (swept - given).unsqueeze(-1), damping.unsqueeze(1)).squeeze(-1)


@torch.no_grad()
def _damping(jacobians_BTDD: Tensor, given_BTD: Tensor, swept_BTD: Tensor) -> Tensor:
    """Return for each text the largest of DAMPING [B] whose step changes no state by more than its size and what a sweep changes."""
    size = torch.maximum(given_BTD.norm(dim=-1), swept_BTD.norm(dim=-1)).clamp_min(1e-30)
    change, choices = swept_BTD - given_BTD, size.new_tensor(DAMPING)
    candidates = choices.expand(len(size), -1)
    steps_BTDM = linear_recurrence(jacobians_BTDD, change.unsqueeze(-1).expand(*change.shape, len(DAMPING)), candidates)
    largest_BM = (steps_BTDM.norm(dim=2) / size.unsqueeze(-1)).amax(dim=1)
    allowed_B1 = 1 + largest_BM[:, :1]  # the first is the sweep
    return torch.where(largest_BM <= allowed_B1, candidates, 0.0).amax(dim=1)


def jacobians(states_BTD: Tensor, previous_BTD: Tensor) -> Tensor:
    """Return the derivatives of each position's state by the state it read [B, T, D, D], without gradient.

    Args:
        states_BTD: results of a pointwise map, with their graph.
        previous_BTD: what it was applied to.
    """
    found = previous_BTD.new_empty(*states_BTD.shape, previous_BTD.shape[-1])
    chosen = torch.zeros_like(states_BTD)
    for row in range(states_BTD.shape[-1]):
        chosen[..., row] = 1
        (found[..., row, :],) = torch.autograd.grad(states_BTD, previous_BTD, chosen, retain_graph=True)
        chosen[..., row] = 0
    return found


def solve(
    step: Map,
    start_BTD: Tensor,
    *,
    sweeps: int,
    solver: Solver = "sweeps",
    tolerance: float | None = None,
    differentiate: int = 0,
    first_BD: Tensor | None = None,
    statistics: bool = False,
) -> Solution:
    """Return the states after `sweeps` sweeps, or after the first whose relative change is at most `tolerance`.

    T sweeps are exact from any start. K differentiated sweeps from converged states give the gradient over all paths with at most
    K - 1 links between positions: back-propagation through time truncated to K steps. Newton steps take their place with
    `solver="newton"`: T of them are exact as well, a few where they converge, and one differentiated step gives the whole gradient.

    Args:
        step: causal map [B, T, D] -> [B, T, D]; a pointwise one for Newton steps.
        start_BTD: first guess, for instance a lagged cache; no gradient reaches it.
        sweeps: most sweeps or Newton steps to make, differentiated ones included.
        solver: what is made.
        tolerance: relative change, unitless, at which the sweeps without gradient stop; None makes them all.
        differentiate: number of last sweeps that keep their graph.
        first_BD: state before position 0; gradient reaches it.
        statistics: measure the residual of every sweep. It reads a number from the device at each sweep, so training steps do without.
    Raises:
        ValueError: `sweeps` below 1, or more differentiated sweeps than sweeps.
    Source: Jacobi iteration on a block-triangular system; `newton` linearises the same system instead.
    """
    if sweeps < 1:
        raise ValueError(f"sweeps={sweeps}: makes no sweep. Allowed: 1 or more. Set it to the sweeps wanted.")
    if not 0 <= differentiate <= sweeps:
        raise ValueError(
            f"differentiate={differentiate}: is not within sweeps={sweeps}. Allowed: 0 to {sweeps}. Raise sweeps or lower it."
        )
    iterate = newton if solver == "newton" else sweep
    measures = statistics or tolerance is not None
    states = start_BTD.detach()
    residuals: list[float] = []
    made = 0
    with torch.no_grad():
        for _ in range(sweeps - differentiate):
            new = iterate(step, states, first_BD)
            made += 1
            if measures:
                residuals.append(relative_change(new, states))
            states = new
            if tolerance is not None and residuals[-1] <= tolerance:
                break
    for _ in range(differentiate):
        new = iterate(step, states, first_BD)
        made += 1
        if measures:
            residuals.append(relative_change(new, states))
        states = new
    return Solution(states, made, tuple(residuals), contraction(residuals))


def unroll(
    model: Recurrent, input_ids: Tensor, state: Any, *, update_memory: bool = True, truncate: int | None = None
) -> tuple[Tensor, Any]:
    """Return the exact states, computed one position after another with the model's own cached state, and the state after them.

    This is the function that is deployed: generation makes the same steps.

    Args:
        model: a model with feedback; its state carries the hidden state of the last position as `state.hidden`.
        input_ids: tokens [B, T].
        state: state before the first of them.
        update_memory: write memories.
        truncate: cut the gradient every so many positions; None keeps it whole.
    Returns:
        States [B, T, D] and the next state.
    """
    states: list[Tensor] = []
    for position in range(input_ids.shape[1]):
        if truncate is not None and position > 0 and position % truncate == 0:
            state = state.detach()
        output = model.encode(
            input_ids[:, position : position + 1],
            state,
            previous_hidden=state.hidden.unsqueeze(1),
            update_memory=update_memory,
        )
        states.append(output.hidden)
        state = output.state
    return torch.cat(states, dim=1), state


@torch.no_grad()
def relative_change(new: Tensor, old: Tensor) -> float:
    """Return |new - old| / |new|, unitless."""
    return (torch.linalg.vector_norm(new - old) / torch.linalg.vector_norm(new).clamp_min(1e-30)).item()


def contraction(residuals: list[float]) -> float | None:
    """Return the geometric mean of successive residual ratios, the first sweep left out; None before three sweeps."""
    positive = [residual for residual in residuals if residual > 0]
    if len(positive) < 3:
        return None
    return (positive[-1] / positive[1]) ** (1 / (len(positive) - 2))
