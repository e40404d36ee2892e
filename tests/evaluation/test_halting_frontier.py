"""The frontier of learned halting: loss against mean steps, every target once."""

from types import SimpleNamespace

import pytest
from small_selective import selective, tokens

from newllm.config.compose import compose
from newllm.evaluation.halting import HaltingConfig, measure
from newllm.evaluation.scoring import score_batch
from newllm.losses.next_token import NO_TARGET


def material(model):
    batches = [{"input_ids": tokens(2, 7, seed), "labels": tokens(2, 7, seed + 10)} for seed in (0, 1)]
    batches[0]["labels"][1, 4] = NO_TARGET
    return SimpleNamespace(model=model, batches=lambda: iter(batches))


def config(*quantiles):
    return HaltingConfig(kind="halting", quantiles=list(quantiles))


def test_thresholds_go_from_the_first_step_to_the_last():
    model = selective("pythia", skip_interval=3, halting="learned")

    found = measure(material(model), config(0.0, 0.5, 1.0))

    steps = [line["mean_steps"] for line in found["by_threshold"]]
    assert steps[0] == 1
    assert 1 < steps[1] < 3
    assert steps[2] == 3
    assert 1 < found["weighted"]["mean_steps"] < 3
    assert found["targets"] == 27


def test_thresholds_divide_gates_that_hardly_differ():
    model = selective("pythia", skip_interval=3, halting="learned")
    model.halting_gate.weight.data.mul_(1e-3)
    model.halting_gate.bias.data.fill_(1.0)

    found = measure(material(model), config(0.0, 0.25, 0.75, 1.0))["by_threshold"]

    assert 0.7 < found[1]["threshold"] < found[2]["threshold"] < 0.75  # around sigmoid(1)
    steps = [line["mean_steps"] for line in found]
    assert steps == sorted(steps)
    assert len(set(steps)) == 4


@pytest.mark.parametrize("quantile", [0.0, 0.5, 1.0])
def test_loss_is_that_of_the_model_deployed_with_the_threshold(quantile):
    model = selective("infini", skip_interval=3, halting="learned")
    given = material(model)

    found = measure(given, config(quantile))["by_threshold"][0]

    model.halting_threshold = found["threshold"]
    first, second = (score_batch(model, batch, None) for batch in given.batches())
    assert found["loss"] == pytest.approx((first + second).metrics()["loss"], rel=1e-6)


def test_a_sure_gate_makes_both_rules_one():
    model = selective("pythia", skip_interval=2, halting="learned")
    model.halting_gate.weight.data.zero_()
    model.halting_gate.bias.data.fill_(60.0)  # the last step's share is then e^-60

    found = measure(material(model), config(0.0))

    assert found["weighted"] == pytest.approx({name: found["by_threshold"][0][name] for name in found["weighted"]})


def test_runs_without_a_gate_are_refused():
    train = compose(["model=selective"])

    assert config(0.5).check(train)[0].startswith("evaluation=[halting]: measures a gate, a model of kind selective")
    assert config().check(train)[0].startswith("evaluation.halting.quantiles=[]: leaves nothing to measure")
