"""The one function that scores: in validation and in evaluation."""

import math

import pytest
import torch
from small_material import batches
from small_sessions import model

from newllm.evaluation import scoring
from newllm.evaluation.scoring import Score, score_batch
from newllm.losses.next_token import NO_TARGET
from newllm.models.transformer import TransformerLM
from newllm.recurrence import solve
from newllm.trainers.lag import sweep_map

BYTES = torch.arange(257) % 3


@torch.no_grad()
def reference(found, batch, hidden):
    """Nats summed over the targets, in one plain call."""
    logits = found.logits(hidden).flatten(0, 1)
    return torch.nn.functional.cross_entropy(
        logits, batch["labels"].flatten(), ignore_index=NO_TARGET, reduction="sum"
    ).item()


@pytest.mark.parametrize("feedback", ["none", "additive"])
@torch.no_grad()
def test_exact_score_is_that_of_the_deployed_function(feedback):
    found, (batch, _) = model(feedback=feedback), batches()
    steps, state = [], found.initial_state(2)
    for ids in batch["input_ids"].split(1, dim=1):
        output = found(ids, state)
        steps.append(output.hidden)
        state = output.state

    score = score_batch(found, batch, BYTES)

    assert score.nats == pytest.approx(reference(found, batch, torch.cat(steps, dim=1)), rel=1e-5)
    assert score.tokens == batch["labels"].numel()
    assert score.bytes == int(BYTES[batch["labels"]].sum())


@torch.no_grad()
def test_accuracy_counts_likeliest_tokens():
    found, (batch, _) = model(), batches()
    batch["labels"] = found(batch["input_ids"]).logits.argmax(-1)
    batch["labels"][0, :4] = (batch["labels"][0, :4] + 1) % 257

    assert score_batch(found, batch, BYTES).correct == batch["labels"].numel() - 4


def test_positions_without_target_count_nowhere():
    found, (batch, _) = model(), batches()
    whole = score_batch(found, batch, BYTES)
    left, right = batch["labels"].clone(), batch["labels"].clone()
    left[:, 4:] = NO_TARGET
    right[:, :4] = NO_TARGET

    parts = [score_batch(found, {**batch, "labels": labels}, BYTES) for labels in (left, right)]

    total = parts[0] + parts[1]
    assert (total.tokens, total.correct, total.bytes) == (whole.tokens, whole.correct, whole.bytes)
    assert total.nats == pytest.approx(whole.nats, rel=1e-12)


def test_batches_are_weighted_by_their_tokens():
    found, (large, small) = model(), batches(sizes=(3, 1))

    scores = [score_batch(found, batch, BYTES) for batch in (large, small)]

    total = scores[0] + scores[1]
    whole = {name: torch.cat([large[name], small[name]]) for name in large}
    assert total.metrics()["loss"] == pytest.approx(score_batch(found, whole, BYTES).metrics()["loss"], rel=1e-6)


@pytest.mark.parametrize("limit", [1, 2 * 257 * 4])
def test_slices_of_logits_change_nothing(monkeypatch, limit):
    found, (batch, _) = model(), batches()
    whole = score_batch(found, batch, BYTES)

    monkeypatch.setattr(scoring, "MAX_LOGITS", limit)

    sliced = score_batch(found, batch, BYTES)
    assert sliced.nats == pytest.approx(whole.nats, rel=1e-6)
    assert sliced.correct == whole.correct


def test_without_feedback_it_is_the_same_stack_built_without():
    found, (batch, _) = model(feedback="gated"), batches()
    found.feedback.norm.bias.data.fill_(0.7)  # zeros fed back would still leave this behind
    bare = TransformerLM(found.vocab_size, found.dim, list(found.layers))
    bare.load_state_dict({name: tensor for name, tensor in found.state_dict().items() if "feedback" not in name})

    assert score_batch(found, batch, BYTES, mode="no_feedback").nats == score_batch(bare, batch, BYTES).nats


@torch.no_grad()
def test_lagged_score_is_that_of_one_sweep_from_zeros():
    found, (batch, _) = model(feedback="additive"), batches()
    zeros = torch.zeros(*batch["input_ids"].shape, found.dim)
    swept = solve(sweep_map(found, batch["input_ids"]), zeros, sweeps=1).states

    score = score_batch(found, batch, BYTES, mode="lagged")

    assert score.nats == pytest.approx(reference(found, batch, swept), rel=1e-5)
    assert score.nats != pytest.approx(score_batch(found, batch, BYTES).nats, rel=1e-3)


def test_metrics_by_hand():
    found = Score(nats=6 * math.log(2), tokens=3, correct=2, bytes=12).metrics()

    assert found == pytest.approx({"loss": 2 * math.log(2), "perplexity": 4, "accuracy": 2 / 3, "bits_per_byte": 0.5})


def test_targets_that_are_no_text_have_no_bits_per_byte():
    found, (batch, _) = model(), batches()

    assert "bits_per_byte" not in score_batch(found, batch, None).metrics()


def test_hopeless_loss_has_infinite_perplexity():
    assert Score(nats=9000.0, tokens=3, correct=0, bytes=3).metrics()["perplexity"] == math.inf
