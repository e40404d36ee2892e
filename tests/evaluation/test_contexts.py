"""Measurements of contexts: statistics with known values, and contexts built to have or lack what is measured."""

import math
from types import SimpleNamespace

import pytest
import torch
from small_material import batches, material

import newllm
from newllm.evaluation import contexts as contexts_evaluation
from newllm.evaluation.context_statistics import (
    agreement,
    effective_rank,
    rank_report,
    readout_accuracy,
    spectral_radius,
    verdict,
)
from newllm.evaluation.contexts import ContextsConfig, measure
from newllm.layers.context_block import initialise

OPTIONS = ContextsConfig(kind="contexts", rows=50, seed=0, sweeps=4, passes=4, power_iterations=20, moved=1e-3)


def generator():
    return torch.Generator().manual_seed(0)


def test_effective_rank_of_equal_directions_is_their_number():
    orthogonal = torch.linalg.qr(torch.randn(40, 5)).Q

    assert effective_rank(orthogonal) == pytest.approx(5, rel=1e-5)
    assert effective_rank(orthogonal[:, :1] @ torch.ones(1, 5)) == pytest.approx(1, rel=1e-4)


def test_effective_rank_by_hand():
    expected = math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))

    assert effective_rank(torch.diag(torch.tensor([2.0, 1.0]))) == pytest.approx(expected, rel=1e-6)


def test_rank_is_told_over_the_width_and_few_rows_are_said_to_be_few():
    mean = 100 * torch.ones(1, 4)
    rows = torch.cat([torch.eye(4), -torch.eye(4)]).repeat(5, 1) + mean  # 40 rows, equal spread around a large mean

    assert rank_report(rows)["centred"] == "100.0% (4.0/4)"
    assert rank_report(rows)["uncentred"].startswith("2")
    assert rank_report(rows)["rows_are_enough"] is True
    assert rank_report(rows[:39])["rows_are_enough"] is False
    assert rank_report(rows[:39])["centred"].endswith("/4), held down by few rows: 39 < 40")


def test_agreement_by_hand():
    found = agreement(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))

    assert found == {"cosine_mean": 0.5, "cosine_least": 0.0, "mse": 2.0}


@pytest.mark.parametrize(
    ("matrix", "radius"),
    [
        ([[0.5, 0.0], [0.0, -0.8]], 0.8),
        ([[0.0, -0.9], [0.9, 0.0]], 0.9),  # a rotation: complex eigenvalues
        ([[0.5, 7.0], [0.0, 0.5]], 0.5),  # grows at first
        ([[0.0, 1.0], [0.0, 0.0]], 0.0),
    ],
)
def test_spectral_radius_is_the_largest_eigenvalue(matrix, radius):
    linear = torch.tensor(matrix, dtype=torch.float64)

    found = spectral_radius(
        lambda states: states @ linear.T, torch.randn(3, 2).double(), iterations=400, generator=generator()
    )

    torch.testing.assert_close(found, torch.full((3,), radius, dtype=torch.float64), atol=0.01, rtol=0.01)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([0.3, 0.2, 0.1], "CONVERGING"),
        ([0.0, 0.0, 0.0], "CONVERGED"),
        ([0.1, 0.2, 0.3], "DIVERGING"),
        ([0.5, 0.1, 0.1, 0.5], "UNSTABLE"),
    ],
)
def test_verdict_follows_slope_and_scatter(changes, said):
    assert verdict(changes) == said


def test_verdict_of_one_change_is_refused():
    with pytest.raises(ValueError, match="1 cannot show a slope"):
        verdict([0.1])


def test_readout_names_tokens_that_contexts_hold_and_no_others():
    tokens = torch.randint(0, 7, (600,), generator=generator())
    holding = torch.randn(7, 12)[tokens] + 0.01 * torch.randn(600, 12)

    held = readout_accuracy(holding, tokens, vocab_size=7, num_fitted=300)
    lost = readout_accuracy(torch.randn(600, 12), tokens, vocab_size=7, num_fitted=300)

    assert held["accuracy"] > 0.99
    assert lost["accuracy"] < 0.3
    assert held["commonest_token"] == lost["commonest_token"] < 0.3


@pytest.fixture
def measured(monkeypatch):
    """Measurement of a model whose weights are of a given width."""

    def run(weight_std, name="context", **keys):
        def build(config, vocab_size):
            return newllm.create_model(name, vocab_size=vocab_size, seed=config.seed, **keys)

        monkeypatch.setattr(contexts_evaluation, "build_model", build)
        model = newllm.create_model(name, vocab_size=200, seed=3, **keys).eval()
        if weight_std is not None:
            initialise(model, weight_std=weight_std)
        ours = material(model, text=batches(sizes=(3, 1), block=16))
        ours.run.config.seed = 3
        return measure(ours, OPTIONS)

    return run


def test_a_block_that_forgets_at_once_is_a_fixed_point(measured):
    found = measured(1.0, context_dim=8)

    assert found["fixed_point"]["spectral_radius"]["mean"] < 0.9
    assert found["memory"]["reach_tokens"] < found["memory"]["farthest_measured"] == 11
    assert found["passes"]["mse_by_pass"][-1] < 1e-4 < found["passes"]["mse_by_pass"][0]
    assert found["identity"]["distance_from_untrained"] > 0.1


def test_an_untrained_block_of_small_weights_adds_up_and_is_none(measured):
    found = measured(None)

    assert found["fixed_point"]["starts"]["cosine_least"] < 0.999
    assert found["fixed_point"]["is_fixed_point"] is False
    assert found["fixed_point"]["sweeps_of_positions"] == "4/16"
    assert found["memory"]["reach_tokens"] == 11
    assert found["identity"]["distance_from_untrained"] == 0
    assert set(found["readout"]) == {"0", "1", "2", "4", "8"}


def test_as_many_sweeps_as_positions_are_exact(measured, monkeypatch):
    monkeypatch.setattr(__name__ + ".OPTIONS", ContextsConfig(**{**vars(OPTIONS), "sweeps": 16}))

    found = measured(None)["fixed_point"]

    assert found["parallel_against_exact"]["mse"] < 1e-10
    assert len(found["residual_by_sweep"]["noise"]) == 16
    assert found["starts"]["cosine_least"] > 0.999
    assert found["is_fixed_point"] is False


@pytest.mark.parametrize("name", ["new_llm", "context_pythia"])
def test_every_model_with_contexts_is_measured(measured, name):
    found = measured(None, name)

    assert set(found) == {"effective_rank", "identity", "fixed_point", "passes", "memory", "readout"}
    assert (
        0
        < found["fixed_point"]["spectral_radius"]["mean"]
        <= found["fixed_point"]["spectral_radius"]["largest"]
        < math.inf
    )
    assert found["effective_rank"]["rows"] == 50


def test_a_model_without_contexts_is_refused():
    config = SimpleNamespace(model=SimpleNamespace(kind="transformer"))

    assert OPTIONS.check(config) == [
        "evaluation.contexts: measures contexts, a model of kind transformer has none. "
        "Allowed: kinds context, context_pythia, new_llm. Take contexts out of evaluation."
    ]
