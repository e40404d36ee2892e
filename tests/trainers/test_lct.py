from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from newllm.config.compose import compose
from newllm.config.problems import ConfigError
from newllm.config.typed import real_config
from newllm.evaluation.scoring import hidden_states
from newllm.models.create import build_model
from newllm.recurrence import unroll
from newllm.trainers.build import build_training_module
from newllm.trainers.lag import gradient_cosine, lag_statistics, sweep_map
from newllm.trainers.lct import LctModule

VOCABULARY, LENGTH, SAMPLES = 19, 6, 10


def module(folder: Path, *overrides: str, filled: bool = True) -> LctModule:
    segments = () if "model=pythia" in overrides else ("layers.segment_length=3",)
    config = real_config(
        compose(
            [
                *("model=infini", "trainer=lct", "trainer.cache_dtype=fp32", f"data.block_length={LENGTH}"),
                *("size.dim=16", "size.num_layers=2", "size.num_heads=2", "size.mlp_dim=32", *segments),
                *overrides,
            ]
        )
    )
    model = build_model(config, VOCABULARY)
    if filled:
        nn.init.normal_(model.feedback.projection.weight, std=0.3)  # type: ignore[union-attr]
    token_bytes = torch.ones(VOCABULARY, dtype=torch.int64)
    built = build_training_module(model, config, token_bytes, num_samples=SAMPLES, folder=folder)
    assert isinstance(built, LctModule)
    return built


def batch(*sample_ids: int) -> dict[str, Tensor]:
    """Blocks whose tokens depend on the sample alone."""
    blocks = torch.stack(
        [torch.randint(VOCABULARY, (LENGTH + 1,), generator=torch.Generator().manual_seed(i)) for i in sample_ids]
    )
    return {"input_ids": blocks[:, :-1], "labels": blocks[:, 1:], "sample_id": torch.tensor(sample_ids)}


def test_the_first_visit_starts_from_init_sweeps_and_later_ones_from_the_last_visit(tmp_path: Path):
    lct, visited = module(tmp_path), batch(4, 7)
    step = sweep_map(lct.model, visited["input_ids"])
    zeros = torch.zeros(2, LENGTH, 16)

    with torch.no_grad():
        first = lct.lagged_states(visited)
        expected = step(torch.cat([zeros[:, :1], step(zeros)[:, :-1]], dim=1))
        states = lct.states(visited)

    assert torch.allclose(first, expected, atol=1e-6)
    assert torch.equal(lct.lagged_states(visited), states)


def test_a_batch_of_old_and_new_samples_gives_each_its_own_start(tmp_path: Path):
    lct = module(tmp_path)
    with torch.no_grad():
        old = lct.states(batch(4))
        alone = lct.lagged_states(batch(8))

    mixed = lct.lagged_states(batch(8, 4))

    assert torch.allclose(mixed[0], alone[0], atol=1e-6)
    assert torch.equal(mixed[1], old[0])


def test_visits_without_learning_reach_the_exact_states(tmp_path: Path):
    lct, visited = module(tmp_path), batch(1, 2, 3)

    with torch.no_grad():
        for _ in range(LENGTH):
            lct.states(visited)

    exact = hidden_states(lct.model, visited["input_ids"])
    assert (lct.lagged_states(visited) - exact).abs().max() < 1e-5


def test_without_a_cache_every_batch_starts_from_nothing(tmp_path: Path):
    lct, visited = module(tmp_path, "trainer.cache=none"), batch(1, 2)
    with torch.no_grad():
        before = lct.lagged_states(visited)
        lct.states(visited)

    assert lct.cache is None
    assert torch.equal(lct.lagged_states(visited), before)


def test_the_projection_gets_a_gradient_from_the_first_visit_on(tmp_path: Path):
    lct = module(tmp_path, filled=False)

    lct.loss(lct.model, lct.states(batch(0, 1)), batch(0, 1)["labels"]).backward()

    assert lct.model.feedback.projection.weight.grad.abs().sum() > 0


def test_the_size_of_the_cache_is_told_before_the_run(tmp_path: Path, caplog):
    with caplog.at_level("INFO"):
        lct = module(tmp_path)

    assert lct.cache is not None
    assert f"the lagged cache takes {lct.cache.nbytes:,} bytes (trainer.cache=ram)" in caplog.messages


def test_validation_does_not_read_the_training_cache(tmp_path: Path):
    lct, visited = module(tmp_path), batch(1, 2)
    lct.validation_step(visited, 0)
    before = lct.sums.total()["exact"]
    lct.cache.states.fill_(1e3)
    lct.cache.visits.fill_(1)
    lct.on_validation_epoch_start()

    lct.validation_step(visited, 0)

    assert lct.sums.total()["exact"] == before
    assert set(lct.sums.total()) == {"exact", "lagged", "no_feedback"}


def test_lag_statistics_measure_the_distance_to_the_exact_states(tmp_path: Path):
    lct, visited = module(tmp_path), batch(1, 2)
    exact = hidden_states(lct.model, visited["input_ids"]).clone()

    settled = lag_statistics(lct.model, visited["input_ids"], exact)
    doubled = lag_statistics(lct.model, visited["input_ids"], 2 * exact)

    assert settled["relative_error"] < 1e-6
    assert settled["sweeps_to_tolerance"] == 1
    assert doubled["relative_error"] == pytest.approx(1.0, abs=1e-5)
    assert doubled["relative_error_by_position"].tolist() == pytest.approx([1.0] * LENGTH, abs=1e-5)
    assert 1 < doubled["sweeps_to_tolerance"] <= LENGTH


def test_more_sweeps_give_a_gradient_nearer_to_the_full_one(tmp_path: Path):
    lct, visited = module(tmp_path), batch(1, 2)
    nn.init.normal_(lct.model.feedback.projection.weight, std=0.6)
    exact = hidden_states(lct.model, visited["input_ids"]).clone()

    cosines = [
        gradient_cosine(lct.model, lct.loss, visited["input_ids"], visited["labels"], exact, sweeps=k, reference=LENGTH)
        for k in (1, 2, LENGTH)
    ]

    assert cosines[0] < cosines[1] < cosines[2]
    assert cosines[2] == pytest.approx(1.0, abs=1e-5)
    assert all(parameter.grad is None for parameter in lct.model.parameters())


def test_auto_raises_the_sweeps_only_as_far_as_the_gradient_asks_and_says_so(tmp_path: Path, caplog):
    weak, strong = module(tmp_path, "trainer.sweeps=auto", filled=False), module(tmp_path, "trainer.sweeps=auto")
    nn.init.normal_(strong.model.feedback.projection.weight, std=1.0)

    with caplog.at_level("INFO"):
        for lct in (weak, strong):
            lct._raise_sweeps(batch(1, 2, 3))

    assert weak.sweeps == 1
    assert 1 < strong.sweeps <= 8
    said = [message for message in caplog.messages if message.startswith("sweeps=auto")]
    assert said[0].endswith("K stays 1")
    assert said[-1].endswith((f"K stays {strong.sweeps}", f"K is now {strong.sweeps}"))


def test_the_probe_reports_under_the_documented_names(tmp_path: Path):
    measured = module(tmp_path).probe(batch(1, 2))

    assert {"lag/relative_error", "lag/sweeps_to_tolerance", "lag/gradient_cosine", "memory/gate_mean"} <= set(measured)
    assert measured["memory/gate_mean"] == pytest.approx(0.5)


NEWTON = ("model=pythia", "layers.window=1", "trainer.solver=newton")


def test_newton_steps_learn_what_exact_training_learns_once_a_sample_has_settled(tmp_path: Path):
    lct, visited = module(tmp_path, *NEWTON), batch(1, 2)
    lct.double()
    lct.cache = None  # which keeps no fp64
    exact, _ = unroll(lct.model, visited["input_ids"], lct.model.initial_state(2))
    lct.loss(lct.model, exact, visited["labels"]).backward()
    wanted = {name: parameter.grad.clone() for name, parameter in lct.model.named_parameters()}
    lct.zero_grad()
    lct.sweeps = LENGTH + 1

    lct.loss(lct.model, lct.states(visited), visited["labels"]).backward()

    for name, parameter in lct.model.named_parameters():
        assert (parameter.grad - wanted[name]).abs().max() < 1e-9, name


def test_newton_steps_go_on_from_the_states_of_the_last_visit(tmp_path: Path):
    lct, visited = module(tmp_path, *NEWTON), batch(3, 5)
    with torch.no_grad():
        first, second = (lct.states(visited) for _ in range(2))
    exact = hidden_states(lct.model, visited["input_ids"])

    assert (first - exact).norm() > 1e-2
    assert (second - exact).norm() < 0.1 * (first - exact).norm()
    assert torch.equal(lct.lagged_states(visited), second)


def test_the_probe_tells_how_many_newton_steps_settle(tmp_path: Path):
    measured = module(tmp_path, *NEWTON).probe(batch(1, 2))

    assert 1 < measured["lag/newton_to_tolerance"] <= measured["lag/sweeps_to_tolerance"]
    assert measured["lag/gradient_cosine"] > 0.5
    assert "lag/newton_to_tolerance" not in module(tmp_path).probe(batch(1, 2))


def test_newton_steps_on_layers_that_look_back_are_refused():
    with pytest.raises(ConfigError, match=r"layers of kind infini, pythia look back") as refused:
        compose(["model=infini", "trainer=lct", "trainer.solver=newton"])

    assert len(refused.value.problems) == 1
    assert compose([*NEWTON, "trainer=lct"]).trainer.solver == "newton"
    assert compose(["model=context", "trainer=lct", "trainer.solver=newton"]).trainer.solver == "newton"


def test_newton_steps_of_sharded_models_are_refused():
    with pytest.raises(ConfigError, match=r"^runtime.strategy=fsdp: gathers a layer's weights for one way back"):
        compose([*NEWTON, "trainer=lct", "runtime=fsdp"])
