"""What a run does from beginning to end, seen from its folder."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import newllm.run
from newllm.config.compose import compose
from newllm.config.library import options
from newllm.load import load_run
from newllm.models.transformer import TransformerLM
from newllm.run import run_training
from newllm.run_lock import only_writer
from newllm.run_record import RunRecord, read_metrics, read_run
from newllm.trainers.lagged_cache import LaggedCache

PROBE = [
    *("model=pythia", "size.dim=16", "size.num_layers=1", "size.num_heads=2", "size.mlp_dim=32", "layers.window=1"),
    *("data=delay_copy", "data.block_length=8", "data.num_samples=40", "data.batch_size=4", "data.eval_batch_size=4"),
    *("trainer.max_steps=6", "trainer.validate_every_steps=2", "trainer.checkpoint_every_steps=2"),
    *("trainer.log_every_steps=1", "schedule.warmup_steps=1", "callbacks.lag_every_steps=2"),
]


def train(folder: Path, *overrides: str) -> float | None:
    given = [*PROBE, f"data.cache_dir={folder.parent / 'cache'}", *overrides]
    return run_training(compose(given), folder, given)


def test_a_run_leaves_what_is_promised(tmp_path: Path):
    folder = tmp_path / "run"

    last = train(folder, "trainer=lct")

    facts = read_run(folder).facts
    assert facts["status"] == "finished"
    assert facts["exit_reason"] == "trainer.max_steps=6 made"
    assert facts["metrics"]["val/loss"] == last
    assert {"parameters", "state_bytes", "flops_per_token", "guards", "data_fingerprint", "git", "packages"} <= set(
        facts
    )
    assert {verdict["status"] for verdict in facts["guards"]} <= {"passed", "warning", "not applicable"}
    for name in (
        "config.yaml",
        "curves.png",
        "DONE",
        "evaluation.json",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
    ):
        assert (folder / name).is_file(), name
    assert [line["step"] for line in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert list((folder / "tensorboard").iterdir())


def test_the_last_step_is_validated_even_off_the_interval(tmp_path: Path):
    train(tmp_path / "run", "trainer=lct", "trainer.max_steps=5")

    assert [line["step"] for line in read_metrics(tmp_path / "run") if "val/loss" in line] == [2, 4, 5]


KILLED = """
import os, signal, sys
from pathlib import Path
from newllm.callbacks.checkpoints import Checkpoints
from newllm.config.compose import compose
from newllm.run import run_training

save = Checkpoints._save_last
def save_and_die(*args):
    save(*args)
    os.kill(os.getpid(), signal.SIGKILL)
Checkpoints._save_last = save_and_die
given = sys.argv[2:]
run_training(compose(given), Path(sys.argv[1]), given)
"""


def test_the_time_of_a_killed_session_counts_up_to_its_last_checkpoint(tmp_path: Path):
    folder = tmp_path / "run"
    given = [*PROBE, f"data.cache_dir={tmp_path / 'cache'}", "trainer=lct"]
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder), *given], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    train(folder, "trainer=lct", f"resume={folder}")

    facts = read_run(folder).facts
    first, second = facts["sessions"]
    assert [session["status"] for session in facts["sessions"]] == ["killed", "finished"]
    assert first["wall_seconds"] > 0
    assert facts["wall_seconds"] == first["wall_seconds"] + second["wall_seconds"]


def test_early_stopping_keeps_the_best_weights_and_says_so(tmp_path: Path):
    # A learning rate this high makes things worse from the first validation on.
    train(
        *(tmp_path / "run", "trainer=lct", "trainer.max_steps=40", "optimizer.lr=3.0", "guards=off"),
        *("trainer.gradient_clip_norm=null", "trainer.early_stopping_patience=2", "schedule=constant"),
    )

    run, lines = load_run(tmp_path / "run"), read_metrics(tmp_path / "run")
    losses = {line["step"]: line["val/loss"] for line in lines if "val/loss" in line}
    assert max(losses) < 40
    assert "early stopping at step" in run.facts["exit_reason"]
    assert losses[run.step] == min(losses.values())


def test_the_states_in_the_cache_are_those_of_their_samples(tmp_path: Path):
    """The first prototype kept states by batch: after the first shuffle they were other samples'."""
    train(
        *(tmp_path / "run", "trainer=lct", "trainer.max_steps=60", "trainer.validate_every_steps=60"),
        *("optimizer.lr=1e-12", "trainer.cache_dtype=fp32", "guards.preflight=false"),
    )
    run = load_run(tmp_path / "run", "last")
    carried = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["lagged_cache"]

    for batch in run.data.train_dataloader():
        exact = run.model(batch["input_ids"]).hidden
        kept = carried["states"][batch["sample_id"]]
        assert (carried["visits"][batch["sample_id"]] >= 5).all()
        assert (kept - exact).abs().max() < 1e-4


def test_the_cost_of_a_run_is_told_without_making_it(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert train(tmp_path / "run", "trainer=lct", "check=true") is None

    told = capsys.readouterr().out
    samples = LaggedCache(36, 8, 16, dtype="bf16").nbytes
    assert f"{samples:,} bytes (ram)" in told
    assert "visits per sample" in told
    assert not (tmp_path / "run").exists()


def test_an_error_in_measuring_leaves_the_run_finished(tmp_path: Path, monkeypatch, capsys):
    def measure(*_):
        raise BrokenPipeError("nobody reads any more")

    monkeypatch.setattr(newllm.run, "run_suite", measure)

    with pytest.raises(BrokenPipeError):
        train(tmp_path / "run")

    assert "the run is finished, what follows it was left out: python evaluate.py run=" in capsys.readouterr().out
    assert read_run(tmp_path / "run").facts["status"] == "finished"
    assert (tmp_path / "run" / "DONE").is_file()
    assert not (tmp_path / "run" / "FAILED").exists()


def test_an_error_in_the_code_of_a_model_is_told_with_its_line(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(TransformerLM, "__init__", lambda self, vocab_size: None)

    with pytest.raises(SystemExit):
        train(tmp_path / "run")

    told = r"got an unexpected keyword argument 'feedback' \(TypeError, newllm/models/transformer\.py, line \d+\)\n$"
    assert re.search(told, capsys.readouterr().err)


def test_data_that_cannot_be_read_is_refused_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture):
    given = ["model=pythia", "data=jsonl", f"data.path={tmp_path / 'missing.jsonl'}", "tokenizer=bytes"]

    with pytest.raises(SystemExit) as refused:
        run_training(compose(given), tmp_path / "run", given)

    assert refused.value.code == 2
    assert "missing.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_full_disk_does_not_hide_why_the_run_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_, **__):
        raise OSError("the checkpoint has no room")

    def cannot_record(*_, **__):
        raise OSError("FAILED has no room")

    monkeypatch.setattr("newllm.run._train_and_record", fail)
    monkeypatch.setattr(RunRecord, "fail", cannot_record)

    with pytest.raises(OSError, match="the checkpoint has no room"):
        train(tmp_path / "run")


def test_a_second_process_may_not_write_the_same_folder(tmp_path: Path, capsys: pytest.CaptureFixture):
    with only_writer(tmp_path / "run"), pytest.raises(SystemExit) as refused:
        train(tmp_path / "run", "trainer=lct")

    assert refused.value.code == 2
    assert "another process is writing this run" in capsys.readouterr().err
    with only_writer(tmp_path / "run"):
        assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [name for name in options("experiment") if name is not None])
def test_every_experiment_runs(experiment: str, tmp_path: Path):
    given = [f"experiment={experiment}", "debug=fast", f"data.cache_dir={tmp_path / 'cache'}", "data.max_unseen=1"]

    run_training(compose(given), tmp_path / "run", given)

    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


def test_a_run_without_best_weights_ends_in_words(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = tmp_path / "run"

    train(folder, "guards=off", "optimizer.lr=1e12", "trainer.gradient_clip_norm=null")

    assert not (folder / "checkpoints" / "best.ckpt").exists()
    assert (folder / "DONE").exists()
    out = capsys.readouterr().out
    assert "nothing is evaluated: val/loss was never finite" in out
    assert "next:" not in out  # evaluate.py would refuse


def test_a_step_that_is_made_already_is_no_place_to_stop(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = tmp_path / "run"
    train(folder, "stop_at_step=4")

    for step in (3, 4):
        with pytest.raises(SystemExit) as refused:
            train(folder, f"resume={folder}", f"stop_at_step={step}")
        assert refused.value.code == 2
        assert f"stop_at_step={step}: the run has made 4 steps already. Allowed: more than 4" in capsys.readouterr().err
    train(folder, f"resume={folder}", "stop_at_step=5")

    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5
