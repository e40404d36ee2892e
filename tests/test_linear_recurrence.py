import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from newllm.linear_recurrence import _Recurrence, linear_recurrence


def loop(factors: Tensor, steps: Tensor, scales: Tensor) -> Tensor:
    """x_t = c A_t x_{t-1} + b_t as it is written."""
    state, states = torch.zeros_like(steps[:, 0]), []
    for t in range(steps.shape[1]):
        state = torch.einsum("bij,bjm,bm->bim", factors[:, t], state, scales) + steps[:, t]
        states.append(state)
    return torch.stack(states, dim=1)


def drawn(batch_size: int, length: int, width: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
    factors = torch.randn(batch_size, length, width, width, dtype=torch.float64) / width**0.5
    steps = torch.randn(batch_size, length, width, number, dtype=torch.float64, requires_grad=True)
    return factors, steps, torch.rand(batch_size, number, dtype=torch.float64)


@given(
    batch_size=st.integers(1, 3),
    length=st.integers(1, 20),
    width=st.integers(1, 5),
    number=st.integers(1, 3),
    chunk=st.integers(1, 22),
)
@settings(deadline=None, max_examples=60)
def test_chunks_of_any_length_give_what_the_loop_gives_and_its_gradients(
    batch_size: int, length: int, width: int, number: int, chunk: int
) -> None:
    factors, steps, scales = drawn(batch_size, length, width, number)
    by_states = torch.randn_like(steps)

    expected = loop(factors, steps, scales)
    (wanted,) = torch.autograd.grad(expected, steps, by_states)
    for solved in (
        _Recurrence.apply(factors, steps, scales.unsqueeze(1), chunk),
        linear_recurrence(factors, steps, scales),
    ):
        (got,) = torch.autograd.grad(solved, steps, by_states)

        assert (solved - expected).abs().max() < 1e-12
        assert (got - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("chunk", [1, 3])
def test_gradients_of_any_order_reach_the_steps(chunk: int) -> None:
    factors, steps, scales = drawn(2, 7, 3, 2)

    def solved(given: Tensor) -> Tensor:
        return _Recurrence.apply(factors, given, scales.unsqueeze(1), chunk)

    assert torch.autograd.gradcheck(solved, steps)
    assert torch.autograd.gradgradcheck(lambda given: solved(given) ** 2, steps)


def test_no_gradient_reaches_factors_and_scales() -> None:
    factors, steps, scales = drawn(1, 4, 2, 1)
    solved = linear_recurrence(factors.requires_grad_(), steps, scales.requires_grad_())

    assert torch.autograd.grad(solved.sum(), [factors, scales, steps], allow_unused=True)[:2] == (None, None)
