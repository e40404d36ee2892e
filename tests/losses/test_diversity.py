"""Diversity losses: values worked out by hand, and what each of them can and cannot see."""

import math

import pytest
import torch

from newllm.losses.diversity import DIVERSITY, DiversityConfig, build

# Centred; singular values 4 and 2, both variances and no covariance by hand.
CROSS = torch.tensor([[2.0, 1.0], [-2.0, 1.0], [2.0, -1.0], [-2.0, -1.0]])
DOUBLE = {"atol": 1e-12, "rtol": 1e-9}


def rows(num_contexts, width=6, dtype=torch.float64):
    return torch.nn.functional.layer_norm(torch.randn(num_contexts, width, dtype=dtype), (width,))


def test_mcdl_by_hand():
    contexts = CROSS + torch.tensor([5.0, -3.0])

    assert DIVERSITY["mcdl"](contexts).item() == pytest.approx(-math.sqrt(20) / 4, rel=1e-6)


def test_nuc_by_hand():
    contexts = CROSS + torch.tensor([5.0, -3.0])

    assert DIVERSITY["nuc"](contexts).item() == pytest.approx(-(4 + 2) / 4, rel=1e-6)


def test_sdl_by_hand():
    expected = 2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)

    assert DIVERSITY["sdl"](CROSS).item() == pytest.approx(expected, rel=1e-6)


def test_oacd_adds_the_squared_mean():
    contexts = CROSS + torch.tensor([3.0, -4.0])

    assert DIVERSITY["oacd"](contexts).item() == pytest.approx(-math.sqrt(20) / 4 + 0.1 * 25, rel=1e-6)


def test_odcm_by_hand():
    contexts = torch.tensor([[0.5, 1.0], [-0.5, -1.0], [0.0, 0.0]])  # variances 0.25 and 1, covariance 0.5

    hinge = (1 - math.sqrt(0.25 + 1e-4)) / 2
    assert DIVERSITY["odcm"](contexts).item() == pytest.approx(hinge + 0.04 * 2 * 0.25 / 2, rel=1e-5)


def test_bounded_by_hand():
    contexts = torch.tensor([[0.5, 2.0], [-0.5, -2.0]])  # standard deviations 0.5 and 2, correlation 1

    assert DIVERSITY["bounded"](contexts).item() == pytest.approx(0.25 / 2 + 2 / 2, rel=1e-5)


@pytest.mark.parametrize("num_contexts", [7, 50, 400])
def test_mcdl_of_normed_contexts_is_at_least_the_root_of_width_over_number(num_contexts):
    contexts = rows(num_contexts)
    opposite = torch.cat([contexts, -contexts])  # mean zero: the bound is met

    assert DIVERSITY["mcdl"](contexts) >= -math.sqrt(6 / num_contexts)
    assert DIVERSITY["mcdl"](opposite).item() == pytest.approx(-math.sqrt(6 / (2 * num_contexts)), rel=1e-4)


def test_mcdl_sees_the_trace_of_the_covariance_only():
    one_direction = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [2.0, 0.0], [-2.0, 0.0]])
    both = one_direction.clone()
    both[2:] = both[2:].flip(1)

    assert DIVERSITY["mcdl"](one_direction) == DIVERSITY["mcdl"](both)
    for name in ("bounded", "nuc", "odcm", "sdl"):
        assert DIVERSITY[name](both) < DIVERSITY[name](one_direction), name


def test_four_times_the_contexts_halve_mcdl_and_leave_bounded():
    contexts = rows(20)
    repeated = contexts.repeat(4, 1)

    torch.testing.assert_close(DIVERSITY["mcdl"](repeated), DIVERSITY["mcdl"](contexts) / 2, **DOUBLE)
    torch.testing.assert_close(DIVERSITY["bounded"](repeated), DIVERSITY["bounded"](contexts), **DOUBLE)


def test_a_larger_gain_pays_off_in_mcdl_and_not_in_bounded():
    contexts = 2 * rows(200)
    assert contexts.std(0).min() > 1

    torch.testing.assert_close(DIVERSITY["mcdl"](3 * contexts), 3 * DIVERSITY["mcdl"](contexts), **DOUBLE)
    torch.testing.assert_close(DIVERSITY["bounded"](3 * contexts), DIVERSITY["bounded"](contexts), **DOUBLE)


def test_sdl_is_minus_the_log_of_the_effective_rank():
    orthogonal = torch.linalg.qr(torch.randn(9, 5, dtype=torch.float64)).Q

    torch.testing.assert_close(DIVERSITY["sdl"](orthogonal).exp(), torch.tensor(1 / 5, dtype=torch.float64), **DOUBLE)


@pytest.mark.parametrize("name", sorted(DIVERSITY))
def test_gradients_are_those_of_finite_differences(name):
    contexts = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(DIVERSITY[name], (contexts,))


@pytest.mark.parametrize("name", sorted(DIVERSITY))
def test_a_step_down_the_gradient_spreads_contexts_that_are_almost_the_same(name):
    contexts = (1 + 0.01 * torch.randn(30, 4, dtype=torch.float64)).requires_grad_()
    before = DIVERSITY[name](contexts)

    (gradient,) = torch.autograd.grad(before, contexts)
    step = 1e-3 * gradient / gradient.norm()

    assert DIVERSITY[name](contexts - step) < before


@pytest.mark.parametrize("name", sorted(DIVERSITY))
@pytest.mark.parametrize("num_contexts", [1, 6])
def test_contexts_that_are_all_the_same_give_a_finite_value_and_gradient(name, num_contexts):
    contexts = torch.ones(num_contexts, 4, requires_grad=True)

    value = DIVERSITY[name](contexts)
    value.backward()

    assert value.isfinite()
    assert contexts.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(DIVERSITY))
def test_half_precision_contexts_are_measured_in_single(name):
    loss = build(DiversityConfig(kind="diversity", name=name, weight=0.9))
    contexts = rows(50, dtype=torch.float32).bfloat16()

    value = loss(contexts)

    assert value.dtype == torch.float32
    assert value == DIVERSITY[name](contexts.float())
    assert loss.weight == 0.9


@pytest.mark.parametrize("name", sorted(DIVERSITY))
@pytest.mark.parametrize("num_contexts", [1, 7])
def test_contexts_of_one_dim_have_a_loss(name, num_contexts):
    contexts = torch.randn(num_contexts, 1, dtype=torch.float64)

    assert DIVERSITY[name](contexts).shape == ()
