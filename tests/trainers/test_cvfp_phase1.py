"""trainer=cvfp_phase1: what an iteration reads, where it ends, and what is left when it is over."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_cvfp import one_text, small_keys, small_procedure

from newllm.config.compose import compose
from newllm.recurrence import sweep
from newllm.run import run_training
from newllm.run_record import read_metrics
from newllm.trainers import context_stream
from newllm.trainers.context_report import IterationSums, clean_report
from newllm.trainers.context_stream import context_map, settle, slices, unroll_stream

ONE_TEXT = "trainer.reset_at_document=false"
QUIET = ("trainer.context_noise=0", "trainer.stop_at_converged_share=null")


def iterate(procedure, count=1):
    """Sweep the training text, without a step."""
    positions, size = procedure.positions["train"], procedure.options.slice_tokens
    with torch.no_grad():
        for _ in range(count):
            for batch in slices(positions, size, device=torch.device("cpu")):
                procedure.states(batch)
    return procedure.caches["train"].contexts.clone()


@pytest.mark.parametrize("carry_over", ["zeros", "wrap"])
@pytest.mark.parametrize("reset", ["true", "false"])
def test_slices_read_the_iteration_before_across_their_borders(reset: str, carry_over: str):
    """Whatever the slices, an iteration is one sweep of the whole stream."""
    kept = []
    for size in (7, 50, 1000):
        keys = (
            f"trainer.slice_tokens={size}",
            f"trainer.reset_at_document={reset}",
            f"trainer.carry_over={carry_over}",
        )
        procedure = small_procedure("cvfp_phase1", *QUIET, *keys, "model.num_input_tokens=2")
        torch.manual_seed(5)
        procedure.begin()
        kept.append(iterate(procedure, 3))

    for other in kept[1:]:
        torch.testing.assert_close(kept[0], other, rtol=1e-5, atol=1e-6)


def test_the_first_position_reads_zeros_or_the_last_context_of_the_iteration_before():
    found = {}
    for carry_over in ("zeros", "wrap"):
        procedure = small_procedure("cvfp_phase1", *QUIET, ONE_TEXT, f"trainer.carry_over={carry_over}")
        torch.manual_seed(5)
        procedure.begin()
        start = procedure.caches["train"].contexts.clone()
        first = next(slices(procedure.positions["train"], 50, device=torch.device("cpu")))
        before = {"zeros": torch.zeros(1, 4), "wrap": start[-1:]}[carry_over]
        previous = torch.cat([before, start[:49]])[None]
        with torch.no_grad():
            expected = context_map(procedure.model, first)(previous)[0]
        found[carry_over] = iterate(procedure)[:50]

        torch.testing.assert_close(found[carry_over], expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found["zeros"][0], found["wrap"][0])


def with_trainer(procedure, iterations: int):
    """Put a stub in the trainer's place, which has made some iterations."""
    procedure._trainer = SimpleNamespace(global_step=iterations)
    procedure.log_dict = lambda found: None
    return procedure


@pytest.mark.parametrize("size", [50, 119, 1000])
def test_a_step_is_that_of_the_mean_over_all_positions_whatever_the_slices(size: int):
    """A short last slice once counted for as much as a long one, and one of a single position made the step NaN."""
    keys = ("loss=odcm", "loss.weight=0.0", f"trainer.slice_tokens={size}")
    procedure = with_trainer(small_procedure("cvfp_phase1", *QUIET, *keys), 1)
    torch.manual_seed(5)
    procedure.begin()
    start = procedure.caches["train"].contexts.clone()
    (whole,) = slices(procedure.positions["train"], 120, device=torch.device("cpu"))
    moved = sweep(context_map(procedure.model, whole), start[None]) - start
    parameters = list(procedure.model.context_block.parameters())
    expected = torch.autograd.grad(moved.square().mean(), parameters)

    for batch in slices(procedure.positions["train"], size, device=torch.device("cpu")):
        (procedure.training_step(batch, 0) / procedure.accumulate_batches).backward()

    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)


def test_contexts_that_a_checkpoint_does_not_carry_are_as_old_as_its_iterations(caplog: pytest.LogCaptureFixture):
    """Zeros would undo the iterations, and settled ones would seem to have converged."""
    procedure = with_trainer(small_procedure("cvfp_phase1"), 2)
    (whole,) = slices(procedure.positions["train"], 120, device=torch.device("cpu"))
    step, expected = context_map(procedure.model, whole), torch.zeros(1, 120, 4)
    with torch.no_grad():
        for _ in range(2):
            expected = sweep(step, expected)

    procedure.on_train_start()

    torch.testing.assert_close(procedure.caches["train"].contexts, expected[0], rtol=1e-5, atol=1e-6)
    assert "the checkpoint carries no contexts" in caplog.text


@pytest.mark.parametrize("reset", ["true", "false"])
def test_wrapping_into_a_stream_of_texts_is_said_to_change_nothing(reset: str, caplog: pytest.LogCaptureFixture):
    small_procedure("cvfp_phase1", "trainer.carry_over=wrap", f"trainer.reset_at_document={reset}")

    assert ("trainer.carry_over=wrap: changes nothing" in caplog.text) == (reset == "true")


@pytest.mark.parametrize("k", [1, 3])
def test_clean_contexts_are_those_of_the_deployed_function(k: int):
    procedure = small_procedure("cvfp_phase1", ONE_TEXT, f"model.num_input_tokens={k}", "model.num_layers=2")
    positions, cache, model = procedure.positions["train"], procedure.caches["train"], procedure.model
    with torch.no_grad():
        expected = model.exact(one_text(procedure)).hidden[0, :, : model.context_dim]

    unroll_stream(model, positions, cache, slice_tokens=50)
    torch.testing.assert_close(cache.contexts, expected, rtol=1e-5, atol=1e-5)
    cache.contexts.normal_()
    settling = settle(model, positions, cache, slice_tokens=50, tolerance=1e-6)

    torch.testing.assert_close(cache.contexts, expected, rtol=1e-4, atol=1e-4)
    assert 1 < settling.sweeps <= 50
    assert settling.exact_positions == 0


def test_the_report_of_contexts_does_not_depend_on_what_training_left_in_them():
    """With its noise left in them, training contexts seemed to converge far less than held-out ones."""
    procedure, found = small_procedure("cvfp_phase1"), []
    positions, cache = procedure.positions["train"], procedure.caches["train"]
    for left in (0.0, 5.0):
        cache.contexts.normal_().mul_(left)
        options = {"sweeps": 2, "slice_tokens": 50, "threshold": 0.03, "tolerance": 1e-6}
        report = clean_report(procedure.model, positions, cache, procedure.loss, torch.arange(60), **options)
        found.append((report, cache.contexts.clone()))

    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][0]["converged_after"] == 2


def test_converged_contexts_are_those_that_hardly_move_in_the_last_sweep():
    procedure = small_procedure("cvfp_phase1")
    positions, model, held = procedure.positions["train"], procedure.model, []
    with torch.no_grad():
        for batch in slices(positions, 120, device=torch.device("cpu")):
            states = torch.zeros(1, 120, model.context_dim)
            for _ in range(3):
                states = sweep(context_map(model, batch), states, torch.zeros(1, model.context_dim))
                held.append(states)
    moved = (held[2] - held[1]).square().mean(-1)
    options = {"sweeps": 3, "slice_tokens": 50, "threshold": moved.median().item(), "tolerance": 1e-6}

    report = clean_report(model, positions, procedure.caches["train"], procedure.loss, torch.arange(60), **options)

    assert report["converged_share"] == f"{59 / 120:.1%} (59/120)"
    assert report["fixed_point_loss"] == pytest.approx(moved.mean().item(), rel=1e-5)


def test_contexts_that_do_not_settle_are_computed_one_by_one(monkeypatch):
    monkeypatch.setattr(context_stream, "MOST_SWEEPS", 2)
    procedure = small_procedure("cvfp_phase1", ONE_TEXT)
    positions, cache = procedure.positions["train"], procedure.caches["train"]
    with torch.no_grad():
        expected = procedure.model.exact(one_text(procedure)).hidden[0, :, :4]

    settling = settle(procedure.model, positions, cache, slice_tokens=50, tolerance=1e-7)

    assert settling.exact_positions == len(positions) == 120
    torch.testing.assert_close(cache.contexts, expected, rtol=1e-5, atol=1e-5)


def test_texts_do_not_read_each_other():
    procedure = small_procedure("cvfp_phase1")
    positions, cache = procedure.positions["train"], procedure.caches["train"]
    starts = [*positions.__getitems__(range(120))["starts_text"][0].nonzero().flatten().tolist(), 120]
    assert len(starts) > 2
    unroll_stream(procedure.model, positions, cache, slice_tokens=50)
    ids, begin = one_text(procedure), starts[1]

    with torch.no_grad():
        alone = procedure.model.exact(ids[:, begin:120]).hidden[0, :, :4]

    end = starts[2] - begin
    torch.testing.assert_close(cache.contexts[begin : begin + end], alone[:end], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("context_dim", "is_few"), [(4, True), (3, False)])
def test_ranks_of_too_few_contexts_are_said_to_be(context_dim: int, is_few: bool, caplog: pytest.LogCaptureFixture):
    small_procedure("cvfp_phase1", f"model.context_dim={context_dim}")

    said = "120 train contexts and 30 validation contexts, fewer than 10 for each of 4 dims" in caplog.text
    assert said == is_few


def test_sums_of_an_iteration_by_hand():
    sums = IterationSums()
    for contexts, moved in (([[3.0, 4.0], [0.0, 0.0]], [0.01, 0.05]), ([[6.0, 8.0]], [0.02])):
        sums.add(torch.tensor([contexts]), torch.tensor([moved]), torch.tensor(float(len(moved))), threshold=0.03)

    found = sums.metrics()

    assert found["context/converged_share"] == 2 / 3
    assert found["context/fixed_point_loss"] == pytest.approx(0.08 / 3)
    assert found["context/diversity_loss"] == pytest.approx((2 * 2 + 1) / 3)
    assert (found["context/norm_mean"], found["context/norm_max"]) == (5.0, 10.0)
    assert found["context/norm_std"] == pytest.approx((125 / 3 - 25) ** 0.5)
    assert sums.histogram().mean() == pytest.approx(-1.667, abs=0.1)  # the three changes' mean log10


def run(folder: Path, *overrides: str):
    given = small_keys(
        "cvfp_phase1", "logger=none", "evaluation=[]", "trainer.max_steps=4", "trainer.min_iterations=3", *overrides
    )
    run_training(compose(given), folder, given)
    return json.loads((folder / "run.json").read_text()), read_metrics(folder)


def test_a_run_reports_contexts_and_no_prediction(tmp_path: Path):
    facts, lines = run(tmp_path / "a")
    same, same_lines = run(tmp_path / "b")
    _, other_lines = run(tmp_path / "c", "seed=1")

    assert facts["status"] == "finished"
    assert not any(name.startswith(("val/", "train/")) for name in facts["metrics"])
    assert {"context/converged_share_untrained", "context/norm_max"} <= lines[0].keys()
    assert "context/converged_share" not in lines[0]  # of no meaning before anything was trained
    last = lines[-1]
    for name in ("converged_share", "fixed_point_loss", "diversity_loss", "effective_rank"):
        assert {f"context/{name}", f"context/{name}_validation"} <= last.keys()
    report = facts["contexts"]
    assert report == same["contexts"]
    assert report["train"]["converged_share"].endswith("/120)")
    assert report["validation"]["converged_share"].endswith("/30)")
    assert report["train"]["effective_rank"]["uncentred"].endswith("/4)")
    assert report["validation"]["effective_rank"]["uncentred"].endswith("/4), held down by few rows: 30 < 40")
    names = [name for name in last if name.startswith("context/")]
    assert [last[name] for name in names] == [same_lines[-1][name] for name in names]
    assert [last[name] for name in names] != [other_lines[-1][name] for name in names]
    assert all(verdict["status"] != "failed" for verdict in facts["guards"])


def test_only_the_context_block_learns(tmp_path: Path):
    run(tmp_path, "trainer.checkpoint_every_steps=1", "stop_at_step=1")
    first = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    run(tmp_path, "trainer.checkpoint_every_steps=1", f"resume={tmp_path}")
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]

    changed = {name.split(".")[1] for name in first if not torch.equal(first[name], last[name])}

    assert changed == {"context_block"}


@pytest.mark.parametrize(
    ("rule", "reason", "steps"),
    [
        ("trainer.stop_at_converged_share=0", "of the validation contexts had converged at iteration 3", 3),
        ("trainer.rank_patience=1 trainer.stop_at_converged_share=null optimizer.lr=1e-9", "had not risen for 1", 3),
    ],
)
def test_a_rule_ends_training_after_the_least_iterations(rule: str, reason: str, steps: int, tmp_path: Path):
    facts, lines = run(tmp_path, *rule.split(), "trainer.context_noise=0", "trainer.max_steps=30")

    assert reason in facts["exit_reason"]
    assert lines[-1]["step"] == steps or "risen" in reason
    assert facts["contexts"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=infini"], "trainer=cvfp_phase1: is for model=context, not for a model of kind transformer"),
        (["embedding.freeze=false"], "embedding.freeze=false: trainer=cvfp_phase1 keeps contexts made over embeddings that stand still"),
        (["data=mqar"], "data=mqar: gives samples of their own"),
        (["trainer.accumulate_batches=2"], "trainer.accumulate_batches=2: trainer=cvfp_phase1 decides itself what makes a step"),
        (["trainer.early_stopping_patience=2"], "trainer=cvfp_phase1 has no val/loss. Allowed: null. Set trainer.rank_patience"),
        (["loss=next_token"], "loss=next_token: trainer=cvfp_phase1 cannot minimise it"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        compose(["model=context", "trainer=cvfp_phase1", *overrides])
