"""A finished run measured from its folder alone."""

import argparse
import dataclasses
import fcntl
import inspect
import json
import shutil
import textwrap
from pathlib import Path

import pytest
import torch

from newllm.config.compose import compose
from newllm.evaluation import perplexity, suite
from newllm.evaluation.scoring import hidden_states
from newllm.evaluation.suite import run_evaluation, run_suite
from newllm.load import load_run
from newllm.run import run_training

TINY = [
    *("model=infini", "trainer=lct", "size.dim=16", "size.num_layers=2", "size.num_heads=2", "size.mlp_dim=32"),
    *("data=jsonl", "data.block_length=16", "data.batch_size=2", "data.eval_batch_size=4"),
    *("data.max_train_blocks=6", "data.max_validation_blocks=6", "data.num_workers=0", "data.max_unseen=1"),
    *("tokenizer=bytes", "trainer.max_steps=2", "trainer.validate_every_steps=2", "trainer.checkpoint_every_steps=2"),
    *("trainer.log_every_steps=1", "callbacks.lag_every_steps=null", "callbacks.sample_every_steps=null"),
    *("evaluation=[]", "guards=off", "logger=none", "schedule.warmup_steps=1"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on the source of two modules."""
    return train(tmp_path_factory.mktemp("trained"), "layers.segment_length=8")


def train(folder: Path, *overrides: str) -> Path:
    text = folder / "text.jsonl"
    sources = [inspect.getsource(module)[:3000] for module in (argparse, inspect, textwrap, json)]
    text.write_text("\n".join(json.dumps({"text": source}) for source in sources))
    given = [*TINY, f"data.path={text}", f"data.cache_dir={folder / 'cache'}", *overrides]
    run_training(compose(given), folder / "run", given)
    return folder / "run"


def evaluate(folder: Path, *overrides: str) -> dict:
    return run_evaluation(compose([f"run={folder}", *overrides], root="evaluate"))


def refused(folder: Path, capsys: pytest.CaptureFixture, *overrides: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        evaluate(folder, *overrides)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "newllm: nothing was started, 1 problem found:\n  - " in error
    return error


def test_all_measurements_are_printed_and_written(trained, capsys):
    names = ["perplexity", "positions", "sliding_window", "lag", "generation"]

    results = evaluate(trained, f"evaluation=[{','.join(names)}]", "evaluation.generation.new_tokens=4")

    assert json.loads((trained / "evaluation.json").read_text()).keys() == {*names, *results}
    out = capsys.readouterr().out
    assert all(f"\n{name}" in f"\n{out}" for name in names)
    assert out.splitlines()[-1] == f"run: {trained}"


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """A run of a machine whose text is not here."""
    run = train(tmp_path, "layers.segment_length=8")
    (tmp_path / "text.jsonl").unlink()
    shutil.rmtree(tmp_path / "cache")
    return run


def test_what_reads_no_text_needs_none(moved, capsys):
    texts = evaluate(moved, "evaluation=[generation]", "evaluation.generation.new_tokens=4")["generation"]

    assert texts
    assert all(1 <= text["new_tokens"] <= 4 for text in texts)
    assert "text.jsonl: does not exist" in refused(moved, capsys, "evaluation=[perplexity]")


def test_a_lost_tokenizer_is_made_again_from_the_text(tmp_path):
    run = train(tmp_path, "layers.segment_length=8")
    names = "evaluation=[perplexity,generation]"
    before = evaluate(run, names, "evaluation.generation.new_tokens=4")

    (run / "tokenizer.json").unlink()

    assert evaluate(run, names, "evaluation.generation.new_tokens=4") == before


def test_a_damaged_tokenizer_is_refused(tmp_path, capsys):
    run = train(tmp_path, "layers.segment_length=8")
    (run / "tokenizer.json").write_text('{"version": "1.0", "trunc')

    assert "cannot be read as a tokenizer" in refused(run, capsys, "evaluation=[generation]")


@pytest.mark.parametrize("batch_size", ["null", "3"])
def test_text_that_has_changed_is_not_measured(batch_size, moved, capsys):
    lines = [json.dumps({"text": inspect.getsource(shutil)[start : start + 3000]}) for start in (0, 3000, 6000, 9000)]
    (moved.parent / "text.jsonl").write_text("\n".join(lines))

    assert "was trained on other data (fingerprint" in refused(moved, capsys, f"batch_size={batch_size}")


def test_other_weights_and_the_test_split_leave_what_reports_compare_as_it_was(trained, capsys):
    evaluate(trained, "evaluation=[perplexity]")
    before = (trained / "evaluation.json").read_text()
    capsys.readouterr()

    for checkpoint, split in (("last", "validation"), ("best", "test"), ("last", "test")):
        evaluate(
            trained,
            *(f"checkpoint={checkpoint}", f"split={split}", "evaluation=[positions]"),
        )
        found = json.loads((trained / f"evaluation_{checkpoint}_{split}.json").read_text())
        assert (found["checkpoint"], found["split"]) == (checkpoint, split)

    of_the_run = json.loads(before)
    assert (of_the_run["checkpoint"], of_the_run["split"]) == ("best", "validation")
    assert (trained / "evaluation.json").read_text() == before


def test_measuring_again_keeps_what_was_measured_before_of_the_same_weights(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    file = folder / "evaluation.json"
    file.unlink(missing_ok=True)
    measured = evaluate(folder, "evaluation=[perplexity,positions]")

    again = evaluate(folder, "evaluation=[generation]", "evaluation.generation.new_tokens=4", "batch_size=1")

    found = json.loads(file.read_text())
    assert found["perplexity"] == measured["perplexity"]
    assert found["reproduced"] == measured["reproduced"]
    assert found["generation"] == again["generation"]
    assert "perplexity" not in again
    assert {name: made["batch_size"] for name, made in found["made_with"].items()} == {
        "perplexity": 4,
        "positions": 4,
        "generation": 1,
    }
    assert found["made_with"]["generation"]["new_tokens"] == 4


def test_measurements_of_an_earlier_step_are_kept_apart(trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    file, aside = folder / "evaluation.json", folder / "evaluation_of_step_1.json"
    evaluate(folder, "evaluation=[perplexity]")
    earlier = json.dumps({**json.loads(file.read_text()), "step": 1})
    file.write_text(earlier)

    evaluate(folder, "evaluation=[positions]")

    assert aside.read_text() == earlier
    assert "perplexity" not in json.loads(file.read_text())
    assert f"{aside}: holds what was measured before, of other weights" in capsys.readouterr().err


def test_what_was_measured_while_training_went_on_is_kept_apart(trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    file = folder / "evaluation.json"
    evaluate(folder, "evaluation=[perplexity]")
    newer = file.read_text()
    early = dataclasses.replace(load_run(folder), step=1)
    options = compose([f"run={folder}", "evaluation=[positions]"], root="evaluate").evaluation

    run_suite(early, options)

    assert file.read_text() == newer
    aside = json.loads((folder / "evaluation_of_step_1.json").read_text())
    assert aside["step"] == 1
    assert "positions" in aside
    assert "evaluation_of_step_1.json: holds what was measured: best.ckpt is of another" in capsys.readouterr().err


def test_a_run_that_measures_nothing_puts_aside_what_was_measured_before_its_end(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    file = folder / "evaluation.json"
    evaluate(folder, "evaluation=[perplexity]")
    earlier = json.dumps({**json.loads(file.read_text()), "step": 1})
    file.write_text(earlier)

    run_suite(load_run(folder), {})

    assert not file.exists()
    assert (folder / "evaluation_of_step_1.json").read_text() == earlier


def test_no_other_evaluation_writes_between_reading_and_writing(trained, tmp_path, monkeypatch):
    folder = shutil.copytree(trained, tmp_path / "run")
    held = []

    def is_held():
        with open(folder / "config.yaml", "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    for name in ("_measured_before", "write_whole"):
        own = getattr(suite, name)
        monkeypatch.setattr(suite, name, lambda *given, own=own: (held.append(is_held()), own(*given))[1])

    evaluate(folder, "evaluation=[positions]")

    assert held == [True, True]
    assert not is_held()


def test_a_measurement_needs_no_gradient_of_its_own_accord(trained, monkeypatch):
    def measure(material, options):
        hidden = hidden_states(material.model, next(material.batches())["input_ids"])
        return {"largest": float(material.model.logits(hidden).max())}

    monkeypatch.setattr(perplexity, "measure", measure)

    assert evaluate(trained, "split=test")["perplexity"]["largest"] > 0


def test_measuring_nothing_is_refused(trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation*"))

    assert "evaluation=[]: measures nothing. Allowed: one or more of contexts, " in refused(
        folder, capsys, "evaluation=[]"
    )
    assert not (folder / "evaluation.json").exists()


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_logged_numbers_come_out_again_to_the_last_digit(trained, tmp_path, precision):
    folder = trained if precision == "32-true" else train(tmp_path, f"runtime.precision={precision}")

    reproduced = evaluate(folder, "evaluation=[perplexity]")["reproduced"]

    assert set(reproduced) == {"val/loss", "val/perplexity", "val/bits_per_byte", "val/accuracy"}
    assert all(entry["equal"] for entry in reproduced.values()), reproduced


def test_averaged_weights_are_the_ones_measured(tmp_path):
    recursive = ["model=trm", "model.num_layers=2", "trainer=trm", "trainer.ema_decay=0.5", "optimizer.lr=0.1"]
    folder = train(tmp_path, *recursive)

    reproduced = evaluate(folder, "evaluation=[perplexity]")["reproduced"]

    assert all(entry["equal"] for entry in reproduced.values()), reproduced
    checkpoint = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    last = checkpoint["current_model_state"]["model.latent_input.weight"]
    loaded = load_run(folder).model.latent_input.weight
    assert torch.equal(loaded, checkpoint["state_dict"]["model.latent_input.weight"])
    assert (loaded - last).abs().max() > 1e-3  # two steps of 0.1: the average is not where training stands


def test_other_batch_size_measures_the_same_text(trained):
    found = [evaluate(trained, "evaluation=[perplexity]", f"batch_size={size}")["perplexity"] for size in (1, 6)]

    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
    assert found[0]["targets"] == found[1]["targets"] == 96


def test_missing_folder_is_refused(tmp_path, capsys):
    assert "run.json: is missing" in refused(tmp_path / "none", capsys)


def test_a_gpu_that_is_not_there_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert "runtime.accelerator=gpu: torch finds no CUDA device" in refused(tmp_path / "none", capsys, "runtime=gpu")


def test_folder_without_checkpoint_is_refused(trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    (folder / "checkpoints" / "best.ckpt").unlink()

    assert "best.ckpt: is missing. Allowed: a run folder with a checkpoint (found: last.ckpt)" in refused(
        folder, capsys
    )


def test_damaged_checkpoint_is_refused(trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    path = folder / "checkpoints" / "best.ckpt"
    path.write_bytes(path.read_bytes()[:1000])

    said = refused(folder, capsys)

    assert "best.ckpt: is damaged" in said
    assert said.endswith("wrote. Use last.ckpt (checkpoint=last) or train again.\n")
    (folder / "checkpoints" / "last.ckpt").unlink()
    assert refused(folder, capsys).endswith("wrote. Train again.\n")


def test_record_without_what_the_model_needs_is_refused(trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    (folder / "run.json").write_text("{}")

    assert "run.json: has no vocab_size. Allowed: what train.py wrote." in refused(folder, capsys)


def test_checkpoint_with_one_changed_byte_is_refused(trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    path = folder / "checkpoints" / "best.ckpt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    assert "best.ckpt: is damaged" in refused(folder, capsys)


def test_checkpoint_of_another_version_is_refused_with_what_differs(trained, tmp_path, capsys):
    folder = tmp_path / "older"
    shutil.copytree(trained, folder)
    path = folder / "checkpoints" / "best.ckpt"
    contents = torch.load(path, weights_only=True)
    weights = contents["state_dict"]
    weights["model.embedding.table"] = weights.pop("model.embedding.weight")
    torch.save(contents, path)

    said = refused(folder, capsys)

    assert (
        "best.ckpt: was trained by another version of newllm, 2 weights have other names (embedding.table and" in said
    )


@pytest.mark.parametrize("trainer", ["standard", "lct"])
def test_run_starts_from_published_weights(tmp_path, trainer):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    published = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=257, **sizes))
    published.save_pretrained(tmp_path / "published")
    options = ["model=pythia", f"trainer={trainer}", f"model.pretrained={tmp_path / 'published'}", "optimizer.lr=1e-12"]

    folder = train(tmp_path, *options)

    weights = load_run(folder).model.layers[1].query_key_value.weight
    expected = published.state_dict()["gpt_neox.layers.1.attention.query_key_value.weight"]
    torch.testing.assert_close(weights, expected, atol=1e-8, rtol=0)


def test_measurement_that_does_not_fit_the_model_is_refused(tmp_path, capsys):
    folder = train(tmp_path, "trainer=standard")

    assert "evaluation.lag: measures a recurrence, the model has none" in refused(folder, capsys, "evaluation=[lag]")


def test_unknown_measurement_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"perplexty[\s\S]*perplexity"):
        compose(["run=x", "evaluation=[perplexty]"], root="evaluate")
