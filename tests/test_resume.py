"""An interrupted run, continued, is the run that was never interrupted: bit for bit, also the second time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from newllm.config.compose import compose
from newllm.config.library import options
from newllm.run import run_training
from newllm.run_record import read_metrics

TINY = [
    *("size.dim=16", "size.num_heads=2", "size.mlp_dim=32"),
    *("data=jsonl", "data.block_length=16", "data.batch_size=2", "data.eval_batch_size=4"),
    *(
        "data.max_train_blocks=14",
        "data.max_validation_blocks=4",
        "data.num_workers=2",
        "data.max_unseen=1",
        "tokenizer=bytes",
    ),
    *("trainer.accumulate_batches=2", "trainer.max_steps=12", "trainer.validate_every_steps=3"),
    *("trainer.checkpoint_every_steps=2", "trainer.log_every_steps=1", "schedule.warmup_steps=2"),
    *("callbacks.lag_every_steps=null", "callbacks.sample_every_steps=5", "callbacks.sample_tokens=4"),
    *("evaluation=[perplexity]", "evaluation.perplexity.compare_compressors=false", "logger=none"),
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Real text: a few modules of the standard library."""
    import argparse
    import ast
    import inspect
    import textwrap

    modules = [argparse, ast, inspect, textwrap]
    lines = [json.dumps({"text": inspect.getsource(module)[:3000]}) for module in modules]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(lines))
    return path


def train(folder: Path, text: Path, *overrides: str) -> dict[str, Any]:
    """Run a session in the folder and return its last checkpoint."""
    given = [*TINY, f"data.path={text}", f"data.cache_dir={text.parent / 'cache'}", *overrides]
    run_training(compose(given), folder, given)
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same(left: Any, right: Any, where: str = "") -> None:
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    else:
        assert left == right, where


INFINI = ["model=infini", "size.num_layers=2", "layers.segment_length=8"]
CONTEXT = ["model=context", "trainer.accumulate_batches=1", "trainer.slice_tokens=50"]
PROCEDURES = {
    "standard": [*INFINI, "trainer=standard"],
    "sequential": [*INFINI, "trainer=sequential"],
    "lct": [*INFINI, "trainer=lct", "trainer.sweeps=2"],
    "lct_disk": [*INFINI, "trainer=lct", "trainer.cache=disk"],
    "lct_no_cache": [*INFINI, "trainer=lct", "trainer.cache=none"],
    "lct_auto": [*INFINI, "trainer=lct", "trainer.sweeps=auto"],
    "streaming": ["model=infini", "layers.segment_length=8", "trainer=streaming"],
    "streaming_lanes": [
        *("trainer=streaming", "trainer.detach_every=2", "trainer.context_tokens=5", "data.max_train_blocks=null"),
        *("model=multi_memory", "layers.memory_heads=2", "layers.segment_length=8", "model.feedback=additive"),
    ],
    "streamed_corpus": [
        *(*INFINI, "trainer=standard", "data.streaming=true", "data.max_train_blocks=null", "data.validation=0:1"),
        *("data.shuffle_buffer=900", "data.sample_characters=2000"),
    ],
    "cvfp_phase1": [*CONTEXT, "trainer=cvfp_phase1", "trainer.stop_at_converged_share=null"],
    "cvfp_phase2": [*CONTEXT, "trainer=cvfp_phase2", "trainer.phase1=untrained", "trainer.batch_size=20"],
    "cvfp": [*CONTEXT, "trainer=cvfp", "trainer.max_iterations=4", "trainer.batch_size=20"],
    "ema": [*INFINI, "trainer=lct", "trainer.ema_decay=0.9"],
    "selective": ["model=selective", "trainer=selective"],
    "trm": ["model=trm", "trainer=trm"],
}


def test_every_trainer_is_continued_here():
    tested = {option.partition("=")[2] for chosen in PROCEDURES.values() for option in chosen if "trainer=" in option}

    assert tested == set(options("trainer"))


@pytest.mark.parametrize("procedure", PROCEDURES)
def test_a_run_continued_twice_equals_the_run_never_interrupted(procedure: str, text: Path, tmp_path: Path):
    chosen = PROCEDURES[procedure]
    straight = train(tmp_path / "straight", text, *chosen)
    folder = tmp_path / "broken"

    train(folder, text, *chosen, "stop_at_step=5")
    train(folder, text, *chosen, f"resume={folder}", "stop_at_step=8")
    continued = train(folder, text, *chosen, f"resume={folder}")

    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "random_state"):
        assert_same(straight[part], continued[part], part)
    for part in ("lagged_cache", "stream", "contexts"):
        if part in straight:
            assert_same(straight[part], continued[part], part)
    without_speed = [
        [{name: value for name, value in line.items() if not name.startswith("speed/")} for line in read_metrics(run)]
        for run in (tmp_path / "straight", folder)
    ]
    assert without_speed[0] == without_speed[1]
    assert (folder / "DONE").exists()


def test_a_cache_too_large_for_a_checkpoint_is_rebuilt_and_said(text: Path, tmp_path: Path, caplog):
    chosen = [*INFINI, "trainer=lct", "trainer.cache_checkpoint_limit=0"]
    train(tmp_path, text, *chosen, "stop_at_step=6")

    with caplog.at_level("WARNING"):
        train(tmp_path, text, *chosen, f"resume={tmp_path}")

    assert "rebuilt by 2 sweeps" in caplog.text
    assert (tmp_path / "DONE").exists()


def test_evaluation_reproduces_what_the_run_logged(text: Path, tmp_path: Path):
    train(tmp_path, text, *INFINI, "trainer=lct")

    results = json.loads((tmp_path / "evaluation.json").read_text())

    assert set(results["reproduced"]) == {"val/loss", "val/perplexity", "val/bits_per_byte", "val/accuracy"}
    assert all(entry["equal"] for entry in results["reproduced"].values()), results["reproduced"]


def _refused(folder: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        train(folder, text, *INFINI, f"resume={folder}")
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_damage_in_an_interrupted_run_is_refused_before_it_goes_on(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    train(folder, text, *INFINI, "stop_at_step=4")
    metrics = folder / "metrics.jsonl"
    whole, record = metrics.read_text(), (folder / "run.json").read_text()

    metrics.write_text("garbage\n" + whole)
    assert f"{metrics}:1: is damaged" in _refused(folder, text, capsys)
    metrics.write_text(whole)
    texts = text.read_text()
    text.write_text(texts.replace("import", "export"))
    assert "resume: the data have fingerprint" in _refused(folder, text, capsys)
    text.write_text(texts)
    checkpoints = folder / "checkpoints"
    (checkpoints / "last.ckpt").write_bytes(b"torn")
    said = _refused(folder, text, capsys)
    assert "last.ckpt: is damaged" in said
    assert "start the run again without resume. What it had learned is still in" in said
    (checkpoints / "best.ckpt").unlink()
    assert _refused(folder, text, capsys).endswith("start the run again without resume.\n")

    assert (folder / "run.json").read_text() == record
