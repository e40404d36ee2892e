"""Loss and work by threshold of the gate that decides whether fine memories are read."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import newllm
from newllm.config.compose import compose
from newllm.evaluation.expansion import ExpansionConfig, expanding_from, measure
from newllm.evaluation.scoring import Score, score_batch
from newllm.losses.next_token import NO_TARGET

VOCABULARY, SEGMENT, LENGTH = 11, 4, 13
SMALL = {"dim": 8, "num_layers": 2, "num_heads": 2, "mlp_dim": 12, "memory_heads": 2, "num_memories": 3}


def material(*, in_lanes: bool = False) -> SimpleNamespace:
    """Two batches of two rows; in lanes the second batch goes on with the first's texts."""
    torch.manual_seed(0)
    model = newllm.create_model("hierarchical", vocab_size=VOCABULARY, segment_length=SEGMENT, **SMALL).eval()
    for parameter in model.parameters():
        parameter.data += 0.4 * torch.randn(parameter.shape)
    batches = []
    for number in range(2):
        tokens = torch.randint(VOCABULARY, (2, LENGTH + 1))
        starts_text = torch.zeros(2, LENGTH, dtype=torch.bool)
        starts_text[:, 0] = number == 0
        batches.append({"input_ids": tokens[:, :-1], "labels": tokens[:, 1:].clone(), "starts_text": starts_text})
    batches[0]["labels"][1, 3] = NO_TARGET
    return SimpleNamespace(
        model=model,
        batches=lambda: iter(batches),
        data=SimpleNamespace(in_lanes=in_lanes, token_bytes=None),
        run=SimpleNamespace(config=SimpleNamespace(trainer=SimpleNamespace())),
    )


def options(*thresholds: float, batches: int = 9) -> ExpansionConfig:
    return ExpansionConfig(kind="expansion", thresholds=list(thresholds), batches=batches)


def test_a_higher_threshold_expands_fewer_positions_and_takes_fewer_flops() -> None:
    given = material()
    middle = measure(given, options(0.0))["by_threshold"][0]["expansion_mean"]

    found = measure(given, options(0.0, middle, 1.0))["by_threshold"]

    shares, flops = ([line[name] for line in found] for name in ("expanded_share", "flops_per_token"))
    assert (shares[0], shares[2]) == (1, 0)
    assert 0 < shares[1] < 1
    assert flops[0] > flops[1] > flops[2]
    assert len({line["expansion_mean"] for line in found}) == 1  # the bottom layer decides alike at every threshold
    heads, width, memories = 2, 4, 3
    fine = (
        2 * memories * heads * width * (width + 1) + 2 * memories * heads * width
    )  # reads, and the choice between them
    assert flops[0] - flops[2] == pytest.approx(fine)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_loss_is_that_of_the_model_deployed_with_the_threshold(threshold: float) -> None:
    given = material()

    found = measure(given, options(threshold))

    given.model.layers[0].expand_threshold = threshold
    scores = [score_batch(given.model, batch, None) for batch in given.batches()]
    expected: Score = scores[0] + scores[1]
    assert found["by_threshold"][0]["loss"] == pytest.approx(expected.metrics()["loss"], rel=1e-6)
    assert found["targets"] == expected.tokens == 4 * LENGTH - 1


def test_lanes_carry_their_memories() -> None:
    given = material(in_lanes=True)
    first, second = given.batches()
    with torch.no_grad():
        whole: Any = given.model.exact(torch.cat([first["input_ids"], second["input_ids"]], dim=1)).hidden
    given.run.config.trainer.context_tokens = 2 * LENGTH
    labels = torch.cat([first["labels"], second["labels"]], dim=1)

    found = measure(given, options(0.0))["by_threshold"][0]

    logits = given.model.logits(whole).detach().flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=NO_TARGET)
    assert found["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_as_many_batches_are_read_as_asked() -> None:
    assert measure(material(), options(0.5, batches=1))["targets"] == 2 * LENGTH - 1


def test_the_models_own_threshold_comes_back() -> None:
    model = material().model
    model.layers[0].expand_threshold = 0.3

    with expanding_from(model, 0.9):
        assert model.layers[0].expand_threshold == 0.9

    assert model.layers[0].expand_threshold == 0.3


def test_stacks_without_such_a_gate_are_refused() -> None:
    assert options(0.5).check(compose(["model=multi_memory", "size.num_layers=2"])) == [
        "evaluation=[expansion]: measures a gate between memories, layers.stack=['multi_memory', 'pythia'] has none. "
        "Allowed with it: stacks with a layer of kind hierarchical. Leave expansion out of the list."
    ]
    assert options(0.5).check(compose(["model=hierarchical"])) == []
    assert options().check(compose(["model=hierarchical"]))[0].startswith("evaluation.expansion.thresholds=[]: leaves")
