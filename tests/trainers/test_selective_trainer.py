"""trainer=selective: what it trains, what it validates, and that one step trains the plain model."""

from pathlib import Path

import pytest
import torch
from short_fit import SHORT, fit
from small_selective import DIM, STACKS, VOCABULARY, layer, selective, tokens

from newllm.config.compose import compose
from newllm.evaluation.scoring import score_batch
from newllm.losses.halting import halting_log_shares, step_nats
from newllm.models.selective import SelectiveLM
from newllm.models.transformer import TransformerLM
from newllm.trainers.build import build_training_module

HALTING = ["trainer=selective", "loss=halting", "model.halting=learned"]
TOKEN_BYTES = torch.ones(VOCABULARY, dtype=torch.int64)


def batches(count, seed=0):
    made = []
    for index in range(count):
        text = tokens(2, 8, seed + index)
        made.append({"input_ids": text[:, :-1], "labels": text[:, 1:]})
    return made


def module(model, overrides):
    config = compose(["model=selective", *SHORT, *overrides])
    return build_training_module(model, config, TOKEN_BYTES, num_samples=4, folder=Path())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [2, 3])
def test_validation_scores_the_emitted_step(steps):
    model = selective("infini", skip_interval=steps)
    validation = batches(2, seed=10)

    metrics = fit(module(model, ["trainer=selective"]), batches(3), validation)

    score = sum(
        (score_batch(model, batch, TOKEN_BYTES) for batch in validation[1:]),
        score_batch(model, validation[0], TOKEN_BYTES),
    )
    assert metrics["val/loss"] == pytest.approx(score.metrics()["loss"], rel=1e-6)
    assert "val/loss_weighted" not in metrics


@pytest.mark.filterwarnings("ignore")
def test_validation_of_learned_halting_shows_both_rules():
    model = selective("pythia", skip_interval=3, halting="learned", halting_threshold=0.5)
    validation = batches(2, seed=10)

    metrics = fit(module(model, HALTING), batches(3), validation)

    nats, weighted, steps, expected = [], [], [], []
    with torch.no_grad():
        for batch in validation:
            levels = model.encode(batch["input_ids"], model.initial_state(2)).levels
            shares = halting_log_shares(model.halting_logits(levels)).exp()
            every = step_nats(model, levels, batch["labels"])
            step = model.emitting_step(levels, 0.5)
            nats.append(every.gather(2, step.unsqueeze(-1)).mean())
            weighted.append((shares * every).sum(-1).mean())
            steps.append((step + 1.0).mean())
            expected.append((shares * torch.tensor([1.0, 2.0, 3.0])).sum(-1).mean())
    means = [torch.stack(values).mean().item() for values in (nats, weighted, steps, expected)]
    names = ["val/loss", "val/loss_weighted", "val/mean_steps", "val/mean_steps_weighted"]
    assert [metrics[name] for name in names] == pytest.approx(means, rel=1e-5)
    assert metrics["val/perplexity"] == pytest.approx(torch.tensor(metrics["val/loss"]).exp().item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_one_step_trains_as_the_plain_model_bit_for_bit():
    torch.manual_seed(3)
    plain = TransformerLM(VOCABULARY, DIM, [layer(kind) for kind in STACKS["infini"]])
    torch.manual_seed(3)
    model = SelectiveLM(VOCABULARY, DIM, [layer(kind) for kind in STACKS["infini"]], skip_interval=1)
    standard = compose(SHORT)

    fit(build_training_module(plain, standard, TOKEN_BYTES, num_samples=4, folder=Path()), batches(3))
    fit(module(model, ["trainer=selective"]), batches(3))

    trained = dict(plain.named_parameters())
    assert all(torch.equal(parameter, trained[name]) for name, parameter in model.named_parameters())


def test_probe_tells_the_shares_of_steps_and_what_the_gate_does():
    fixed = module(selective("pythia", skip_interval=2), ["trainer=selective"]).probe(batches(1)[0])
    learned = module(selective("pythia", skip_interval=2, halting="learned"), HALTING).probe(batches(1)[0])

    assert fixed["selective/output_ratio"] == fixed["selective/carry_over_ratio"] == 0.5
    assert 1 <= learned["halting/mean_steps"] <= 2
    assert -1 <= learned["halting/gate_entropy_correlation"] <= 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer=selective"], "trainer=selective: is for model=selective, not for a model of kind transformer"),
        (["model=selective", "model.skip_interval=0"], "model.skip_interval=0: is out of range. Allowed: an integer at least 1"),
        (["model=selective", "model.halting=learned"], "trainer=standard: does not train all of this model"),
        (["model=selective", "trainer=selective", "loss=halting"], "loss=halting: weighs steps by a gate, model=selective has none"),
        (["model=selective", "trainer=selective", "model.halting=learned"], "loss=fixed_skip: trains the last step only"),
        (["model=selective", "loss=fixed_skip"], "loss=fixed_skip: trainer=standard cannot minimise it"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        compose(overrides)
