"""trainer=cvfp_phase2 and cvfp: what a step reads, what is taken from phase 1, what is refused."""

import json
import logging
from pathlib import Path

import psutil
import pytest
import torch
from small_cvfp import one_text, small_config, small_keys, small_procedure

from newllm.config.compose import compose
from newllm.cost import describe_cost
from newllm.run import run_training
from newllm.trainers.batch_size import batch_size_for
from newllm.trainers.context_cache import ContextCache
from newllm.trainers.cvfp_phase1 import CvfpPhase1Module

ONE_TEXT = "trainer.reset_at_document=false"
UNTRAINED = "trainer.phase1=untrained"


def untrained(*overrides: str, **options):
    procedure = small_procedure("cvfp_phase2", UNTRAINED, "trainer.tolerance=1e-7", *overrides, **options)
    procedure.on_fit_start()
    return procedure


@pytest.mark.parametrize("contexts", ["exact", "parallel"])
@pytest.mark.parametrize("plan", ["A", "E", "F", "G", "none"])
def test_states_of_shuffled_positions_are_those_of_the_deployed_function(plan: str, contexts: str):
    keys = ("model.num_layers=2", "model.num_input_tokens=2", f"model.plan={plan}", f"trainer.contexts={contexts}")
    procedure = untrained(ONE_TEXT, *keys)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(3))

    with torch.no_grad():
        expected = procedure.model.exact(one_text(procedure)).hidden
        states = procedure.states(procedure.positions.__getitems__(order.tolist()))

    torch.testing.assert_close(states[0], expected[0, order], rtol=1e-4, atol=1e-4)


def test_contexts_on_disk_are_those_in_memory(tmp_path: Path):
    kept = [
        untrained(f"trainer.cache={where}", "model.num_layers=2", folder=tmp_path).cache for where in ("ram", "disk")
    ]

    assert torch.equal(kept[0].contexts, kept[1].contexts)
    assert (tmp_path / "layer_contexts.bin").stat().st_size == kept[0].nbytes == 120 * 2 * 4 * 4


def test_only_the_token_block_and_an_untied_head_learn():
    for tied, expected in (("true", {"token_block"}), ("false", {"token_block", "head"})):
        procedure = untrained(f"model.weight_tying={tied}")
        batch = procedure.positions.__getitems__([5, 3, 17])

        procedure.loss(procedure.model, procedure.states(batch), batch["labels"]).backward()

        learning = {name.split(".")[0] for name, part in procedure.model.named_parameters() if part.grad is not None}
        assert learning == expected


def test_epochs_and_steps_both_end_training():
    assert small_procedure("cvfp_phase2", UNTRAINED, "trainer.batch_size=50", "trainer.epochs=4").max_steps == 12
    assert small_procedure("cvfp_phase2", UNTRAINED, "trainer.epochs=null").max_steps == 2000


def test_automatic_batch_size_by_hand(caplog):
    assert batch_size_for(10**9, 0, vocab_size=10000) == int(0.4e9 / 140000)
    assert batch_size_for(10**6, 0, vocab_size=10000) == 256
    assert batch_size_for(10**13, 0, vocab_size=10000) == 16384

    with caplog.at_level(logging.INFO):
        size = small_procedure("cvfp_phase2", UNTRAINED, "trainer.batch_size=auto").batch_size

    assert f"within 256 and 16384: {size}" in caplog.text


def test_bytes_are_told_before_contexts_are_made(caplog):
    with caplog.at_level(logging.INFO):
        untrained("model.num_layers=2")

    assert "120 positions x 2 layers x 4 values x 4 bytes = 3,840 bytes (ram)" in caplog.text


@pytest.mark.parametrize(
    ("trainer", "option", "contexts", "steps"),
    [
        ("cvfp_phase1", "trainer.max_steps=7", "1,920 bytes (ram)", "7 of 120 positions"),
        ("cvfp", "trainer.batch_size=50", "3,840 bytes (ram)", "2,000 of 50 positions"),
        ("cvfp", "trainer.batch_size=auto", "3,840 bytes (ram)", "2,000 at most, of as many positions as fit"),
    ],
)
def test_cost_is_told_in_contexts_and_positions(trainer: str, option: str, contexts: str, steps: str):
    told = dict(line.split(maxsplit=1) for line in describe_cost(small_config(trainer, option)).splitlines())

    assert (told["contexts"], told["steps"]) == (contexts, steps)


@pytest.mark.parametrize(("cache", "kept"), [("ram", 60), ("disk", 0)])
def test_cost_counts_contexts_kept_in_ram_as_memory(monkeypatch: pytest.MonkeyPatch, cache: str, kept: int):
    monkeypatch.setattr(CvfpPhase1Module, "kept_values", classmethod(lambda cls, model: 60 * 2**20 // (4 * 120)))
    config = small_config("cvfp_phase1", f"trainer.cache={cache}")

    line = describe_cost(config).splitlines()[-1]

    part = f" for the model and a batch, with {kept} MiB of kept states" if kept else " for the model and a batch"
    assert f"{part}, there are " in line
    assert int(line.split()[2]) in (kept, kept + 1)
    assert " MiB besides, validation and checkpoints come on top" in line


def test_contexts_that_do_not_fit_are_refused_with_both_figures(tmp_path: Path, monkeypatch):
    free = psutil.virtual_memory()._replace(available=2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)

    with pytest.raises(ValueError, match=r"need 1\.86 GiB, there are 1\.00 GiB of free memory.*trainer\.cache=disk"):
        ContextCache.empty(10**6, 500)


def run(folder: Path, trainer: str, *overrides: str):
    quiet = ("logger=none", "evaluation=[]", "trainer.max_steps=6", "trainer.validate_every_steps=3")
    given = small_keys(trainer, *quiet, *overrides)
    run_training(compose(given), folder, given)
    return json.loads((folder / "run.json").read_text())


ITERATIONS = ("trainer.stop_at_converged_share=null", "optimizer.lr=2e-3")


@pytest.fixture(scope="module")
def phase1(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phase1")
    run(folder, "cvfp_phase1", *ITERATIONS, "trainer.max_steps=3")
    return folder


@pytest.mark.slow
def test_one_run_equals_its_phases_run_apart_and_its_interrupted_self(
    tmp_path: Path, phase1: Path, capsys: pytest.CaptureFixture[str]
):
    both = ("trainer.max_iterations=3", ITERATIONS[0], "trainer.checkpoint_every_iterations=1", "model.num_layers=1")

    whole = run(tmp_path / "whole", "cvfp", *both)
    apart = run(tmp_path / "apart", "cvfp_phase2", f"trainer.phase1={phase1}")
    broken = tmp_path / "broken"
    run(broken, "cvfp", *both, "stop_at_step=2")
    assert not (broken / "checkpoints" / "last.ckpt").exists()  # it was stopped in phase 1
    assert (
        f"Continue with: resume={broken}\n" in capsys.readouterr().out
    )  # not its phase 1, which goes on with it alone
    assert json.loads((broken / "run.json").read_text())["status"] == "stopped"
    continued = run(broken, "cvfp", *both, f"resume={broken}")

    for other in (apart, continued):
        assert other["status"] == "finished"
        assert other["metrics"]["val/loss"] == whole["metrics"]["val/loss"]
        assert other["metrics"]["train/loss"] == whole["metrics"]["train/loss"]
    assert whole["phase1"]["iterations"] == 3
    assert whole["phase1"]["contexts"]["train"]["converged_share"].endswith("/120)")


def test_a_phase_1_of_another_model_is_refused_with_the_difference(phase1: Path):
    for key, message in (
        ("model.context_dim=5", r"of another model or text: model\.context_dim is 4 there and 5 here"),
        ("data.max_train_blocks=11", "the training text has fingerprint"),
        ("seed=1", "the token embedding has other values"),
    ):
        with pytest.raises(ValueError, match=message):
            small_procedure("cvfp_phase2", f"trainer.phase1={phase1}", key)


def test_a_folder_without_phase_1_is_refused(tmp_path: Path, phase1: Path):
    with pytest.raises(ValueError, match="there is no run"):
        small_procedure("cvfp_phase2", f"trainer.phase1={tmp_path}")
    with pytest.raises(ValueError, match=r"trainer\.phase1=null: phase 2 needs the context block of a phase 1"):
        compose(["model=context", "trainer=cvfp_phase2"])


@pytest.mark.filterwarnings("default")
def test_plans_that_coincide_are_said_to(recwarn):
    small_procedure("cvfp_phase2", UNTRAINED, "model.plan=G")

    assert any("with model.num_layers=1 plans A, E, F and G are the same" in str(entry.message) for entry in recwarn)
