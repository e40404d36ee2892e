"""Learned halting: shares that sum to 1, a loss by hand, the divergence from the geometric distribution."""

import math

import pytest
import torch
from small_selective import selective, tokens

from newllm.losses.halting import (
    HaltingConfig,
    HaltingLoss,
    geometric_log_shares,
    halting_log_shares,
    step_nats,
)
from newllm.losses.next_token import NO_TARGET


def loss(prior=0.3, kl_weight=0.0):
    return HaltingLoss(HaltingConfig(kind="halting", prior=prior, kl_weight=kl_weight))


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 300.0])
def test_shares_of_a_token_sum_to_one(scale):
    shares = halting_log_shares(scale * torch.randn(2, 5, 3)).exp()

    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 5))  # fp32 sums of four terms


def test_shares_by_hand():
    gates = torch.tensor([0.25, 0.5], dtype=torch.float64)

    shares = halting_log_shares(torch.logit(gates)).exp()

    torch.testing.assert_close(shares, torch.tensor([0.25, 0.375, 0.375], dtype=torch.float64))


def test_prior_is_geometric_with_its_tail_at_the_last_step():
    shares = geometric_log_shares(4, 0.3).exp()

    torch.testing.assert_close(shares, torch.tensor([0.3, 0.21, 0.147, 0.343], dtype=torch.float64))


def test_loss_is_the_mean_over_targets_of_the_weighed_steps():
    model, labels = selective("pythia", skip_interval=3, halting="learned"), tokens(2, 5, seed=1)
    labels[0, 2] = NO_TARGET
    levels = model.encode(tokens(2, 5), model.initial_state(2)).levels
    shares = halting_log_shares(model.halting_logits(levels)).exp()

    total, count = 0.0, 0
    for row in range(2):
        for t in range(5):
            if labels[row, t] == NO_TARGET:
                continue
            scores = model.logits(levels[row, t]).log_softmax(-1)[:, labels[row, t]]
            total, count = total - (shares[row, t] * scores).sum().item(), count + 1

    assert loss()(model, levels, labels).item() == pytest.approx(total / count, rel=1e-5)


def test_divergence_vanishes_where_the_gate_is_the_prior():
    model, labels = selective("pythia", skip_interval=3, halting="learned"), tokens(2, 5, seed=1)
    levels = model.encode(tokens(2, 5), model.initial_state(2)).levels
    model.halting_gate.weight.data.zero_()
    model.halting_gate.bias.data.fill_(math.log(0.3 / 0.7))
    free, priced = (loss(kl_weight=weight)(model, levels, labels).item() for weight in (0.0, 100.0))
    other = loss(prior=0.6, kl_weight=100.0)(model, levels, labels).item()

    assert priced == pytest.approx(free, abs=1e-4)  # a hundred times the rounding of fp32
    assert other > free + 1


def test_gate_gets_a_gradient_towards_the_better_step():
    model, labels = selective("pythia", skip_interval=2, halting="learned"), tokens(2, 5, seed=1)
    levels = model.encode(tokens(2, 5), model.initial_state(2)).levels.detach()
    nats = step_nats(model, levels, labels)

    loss()(model, levels, labels).backward()

    # With one common gate the better step on average would get all; a bias of the gate moves just that way.
    gates = model.halting_logits(levels).sigmoid()
    slope = (gates * (1 - gates) * (nats[..., :1] - nats[..., 1:])).mean()
    assert model.halting_gate.bias.grad.item() == pytest.approx(slope.item(), rel=1e-4)


def test_statistics_tell_what_the_gate_does():
    model, labels = selective("pythia", skip_interval=3, halting="learned", halting_threshold=0.5), tokens(2, 5)
    levels = model.encode(tokens(2, 5), model.initial_state(2)).levels
    model.halting_gate.weight.data.zero_()
    model.halting_gate.bias.data.zero_()

    found = loss().statistics(model, levels, labels)

    assert found["halting/gate_mean"] == found["halting/gate_min"] == found["halting/gate_max"] == 0.5
    assert found["halting/gate_std"] == 0
    assert found["halting/gate_entropy_correlation"] == 0  # of a constant with anything
    assert found["halting/mean_steps"] == 3  # no gate is above one half
    assert found["halting/mean_steps_weighted"] == pytest.approx(0.5 * 1 + 0.25 * 2 + 0.25 * 3)
