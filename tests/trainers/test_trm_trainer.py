"""trainer=trm: what it trains and validates, averaged weights, the truncated gradient."""

import math
from pathlib import Path

import pytest
import torch
from short_fit import SHORT, fit
from small_selective import tokens
from small_trm import VOCABULARY, trm

from newllm.callbacks.weight_average import WeightAverage
from newllm.config.compose import compose
from newllm.evaluation.scoring import score_batch
from newllm.losses.next_token import NextTokenConfig, NextTokenLoss
from newllm.trainers.build import build_training_module

TOKEN_BYTES = torch.ones(VOCABULARY, dtype=torch.int64)


def batches(count, seed=0):
    made = []
    for index in range(count):
        text = tokens(2, 8, seed + index)
        made.append({"input_ids": text[:, :-1], "labels": text[:, 1:]})
    return made


def module(model, *overrides):
    config = compose(["model=trm", "trainer=trm", *SHORT, *overrides])
    return build_training_module(model, config, TOKEN_BYTES, num_samples=4, folder=Path())


@pytest.mark.filterwarnings("ignore")
def test_validation_scores_the_last_answer():
    model, validation = trm(stirred=0.0), batches(1, seed=10)

    metrics = fit(module(model), batches(3), validation)

    assert metrics["val/loss"] == pytest.approx(score_batch(model, validation[0], TOKEN_BYTES).metrics()["loss"])
    assert 0.8 < metrics["val/loss"] / math.log(VOCABULARY) < 1.3


@pytest.mark.filterwarnings("ignore")
def test_validation_uses_the_averaged_weights():
    model, train, validation = trm(stirred=0.0), batches(4), batches(1, seed=10)
    decay, average, seen = 0.5, {}, []
    training = module(model, "optimizer.lr=0.1")
    training.on_train_batch_end = lambda *_: seen.append(
        {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    )

    metrics = fit(training, train, validation, callbacks=[WeightAverage(decay)])

    for weights in seen:
        for name, weight in weights.items():
            average[name] = weight if name not in average else decay * average[name] + (1 - decay) * weight
    last = trm(stirred=0.0)
    last.load_state_dict(seen[-1], strict=False)
    averaged = trm(stirred=0.0)
    averaged.load_state_dict(average, strict=False)
    expected, other = (score_batch(m, validation[0], TOKEN_BYTES).metrics()["loss"] for m in (averaged, last))
    assert metrics["val/loss"] == pytest.approx(expected, rel=1e-5)
    assert abs(expected - other) > 1e-3
    # Training ends with the average in place: what is saved and evaluated.
    torch.testing.assert_close(dict(model.named_parameters()), average)


def test_published_average_is_the_default():
    assert compose(["model=trm", "trainer=trm"]).trainer.ema_decay == 0.999


def test_unshifted_targets_are_seen_in_the_loss():
    """Loss to 0 and one token repeated: what a model does that may copy its input."""
    losses = {}
    for name, shift in (("right", 1), ("wrong", 0)):
        model = trm(stirred=0.0)
        training = module(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
        for index in range(60):
            text = tokens(8, 9, seed=index)
            batch = {"input_ids": text[:, : 9 - shift], "labels": text[:, shift:]}
            optimizer.zero_grad()
            loss = training.loss(model, training.states(batch), batch["labels"])
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()

    assert losses["wrong"] < 0.5 * math.log(VOCABULARY)
    assert losses["right"] > 0.9 * math.log(VOCABULARY)  # random tokens cannot be predicted


def test_gradient_of_one_cycle_is_whole_where_there_is_one():
    one = module(trm(deep_steps=1, supervision_steps=1)).gradient_cosine(batches(1)[0])
    more = module(trm(deep_steps=3, supervision_steps=2)).gradient_cosine(batches(1)[0])

    assert one == pytest.approx(1, abs=1e-6)
    assert -1 <= more < 0.999


@pytest.mark.parametrize("rung", ["ladder_5_no_grad", "ladder_6_supervision", "ladder_7_halting"])
def test_rungs_with_free_cycles_tell_the_cosine(rung):
    config = compose([f"experiment={rung}"])
    sizes = {name: getattr(config.model, name) for name in ("latent_steps", "deep_steps", "supervision_steps")}
    training = build_training_module(trm(**sizes), config, TOKEN_BYTES, num_samples=4, folder=Path())

    assert -1 <= training.probe(batches(1)[0])["trm/gradient_cosine"] < 0.999


def test_one_supervision_step_without_judgement_is_the_next_token_loss():
    """What lets rung 5 of the recursion ladder train as rung 4 does."""
    model, batch = trm(supervision_steps=1), batches(1)[0]
    next_token = NextTokenLoss(NextTokenConfig(kind="next_token"))
    training = module(model, "loss.act_weight=0")

    losses = {}
    for name, loss, states in (
        ("supervised", training.loss, training.states(batch)),
        ("plain", next_token, model.encode(batch["input_ids"], model.initial_state(2)).hidden),
    ):
        model.zero_grad()
        found = loss(model, states, batch["labels"])
        found.backward()
        losses[name] = (found.detach(), model.latent_input.weight.grad.clone())

    torch.testing.assert_close(losses["supervised"], losses["plain"], atol=1e-6, rtol=1e-5)


def test_probe_leaves_gradients_alone_and_tells_every_step():
    training = module(trm(supervision_steps=2))

    found = training.probe(batches(1)[0])

    assert {"trm/loss_step_1", "trm/loss_step_2", "trm/halting_accuracy", "trm/gradient_cosine"} <= found.keys()
    assert all(parameter.grad is None for parameter in training.parameters())


def test_autocast_keeps_the_gradient_of_cycles_after_free_ones():
    """Weights cast while gradients were off must not be reused when they are on."""
    model, batch = trm(deep_steps=2), batches(1)[0]
    training = module(model)
    gradients = []
    for is_enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_enabled):
            loss = training.loss(model, training.states(batch), batch["labels"])
        loss.backward()
        gradients.append(model.latent_input.weight.grad.flatten())

    # bf16 keeps three digits of every product.
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.9


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer=trm"], "trainer=trm: is for model=trm, not for a model of kind transformer"),
        (["model=trm", "loss=deep_supervision"], "loss=deep_supervision: trainer=standard cannot minimise it"),
        (["model=trm", "model.supervision_steps=0"], "model.supervision_steps=0: is out of range. Allowed: an integer at least 1"),
        (["model=trm", "trainer=trm", "data.block_length=513"], "data.block_length=513: is more than model.max_positions=512"),
        (["model=trm", "data.block_length=513"], "data.block_length=513: is more than model.max_positions=512"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        compose(overrides)
