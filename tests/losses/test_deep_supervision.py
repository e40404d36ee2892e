"""Deep supervision: the loss by hand, and halting targets that say whether more steps help."""

import pytest
import torch
from small_selective import tokens
from small_trm import trm
from torch import nn

from newllm.losses.deep_supervision import DeepSupervisionConfig, DeepSupervisionLoss, halting_targets, step_nats
from newllm.losses.next_token import NO_TARGET


def loss(act_weight=0.0, margin=0.01):
    return DeepSupervisionLoss(
        DeepSupervisionConfig(kind="deep_supervision", act_weight=act_weight, halting_margin=margin)
    )


def example():
    model, labels = trm(supervision_steps=3), tokens(2, 5, seed=1)
    labels[0, 2] = NO_TARGET
    return model, model.encode(tokens(2, 5), model.initial_state(2)).levels, labels


def test_halting_is_right_where_no_later_step_helps():
    nats = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0], [1.0, 0.95, 0.85], [1.0, 1.0, 1.0]])

    targets = halting_targets(nats, margin=0.1)

    assert targets.tolist() == [[0, 0, 1], [1, 1, 1], [0, 0, 1], [0, 1, 1], [1, 1, 1]]


def test_loss_is_the_mean_over_targets_and_supervision_steps():
    model, levels, labels = example()

    total, count = 0.0, 0
    for row in range(2):
        for t in range(5):
            for step in range(3):
                if labels[row, t] != NO_TARGET:
                    total -= model.logits(levels[row, t, step]).log_softmax(-1)[labels[row, t]].item()
                    count += 1

    assert loss()(model, levels, labels).item() == pytest.approx(total / count, rel=1e-5)


def test_judgement_is_the_binary_cross_entropy_of_its_targets():
    model, levels, labels = example()
    is_target = labels != NO_TARGET
    targets = halting_targets(step_nats(model, levels, labels), 0.01)[is_target]
    judged = model.halting_logits(levels)[is_target].sigmoid()
    by_hand = -(targets * judged.log() + (1 - targets) * (1 - judged).log()).mean()

    difference = loss(act_weight=0.5)(model, levels, labels) - loss()(model, levels, labels)

    assert 0 < targets.mean() < 1, "the example must hold both cases"
    torch.testing.assert_close(difference, 0.5 * by_hand, atol=1e-6, rtol=1e-5)


def test_judgement_learns_what_helps():
    model, levels, labels = example()
    levels, gate = levels.detach(), nn.Linear(8, 1)
    model.halting_gate = gate
    before = loss().statistics(model, levels, labels)["trm/halting_accuracy"]
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.1)

    for _ in range(200):
        optimizer.zero_grad()
        loss(act_weight=1.0)(model, levels, labels).backward()
        optimizer.step()

    assert loss().statistics(model, levels, labels)["trm/halting_accuracy"] > max(before, 0.75)


def test_statistics_are_by_supervision_step():
    model, levels, labels = example()

    found = loss().statistics(model, levels, labels)

    nats = step_nats(model, levels, labels)[labels != NO_TARGET]
    assert [found[f"trm/loss_step_{n}"] for n in (1, 2, 3)] == pytest.approx(nats.mean(0).tolist(), rel=1e-5)
    assert found["trm/halting_target_mean"] == pytest.approx(halting_targets(nats, 0.01).mean().item())
