"""Several processes, one run: the same folder, the same losses, the same refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from newllm.config.compose import ConfigError, compose
from newllm.launch import place_of
from newllm.run_record import read_metrics, read_run

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    *("size.dim=16", "size.num_heads=2", "size.mlp_dim=32", "size.num_layers=2", "layers.segment_length=8"),
    *("data=stdlib", "tokenizer=bytes", "data.block_length=16", "data.batch_size=5", "data.eval_batch_size=4"),
    *(
        "data.max_train_blocks=13",
        "data.max_validation_blocks=9",
        "data.max_unseen=1",
    ),  # the last batch has 3 rows: 2 and 1
    *("trainer.max_steps=8", "trainer.validate_every_steps=4", "trainer.checkpoint_every_steps=4"),
    *(
        "trainer.log_every_steps=1",
        "schedule.warmup_steps=2",
        "callbacks.sample_every_steps=4",
        "callbacks.sample_tokens=4",
    ),
    *("evaluation=[perplexity]", "evaluation.perplexity.compare_compressors=false", "guards.leak_steps=0"),
]
PROCEDURES = {
    "standard": ["model=infini", "trainer=standard"],
    "lct": ["model=infini", "trainer=lct", "callbacks.lag_every_steps=2"],
    "streaming": [
        *("model=infini", "layers=all_infini", "trainer=streaming", "data.max_train_blocks=600"),
        "data.max_validation_blocks=200",
    ],
}


def start(folder: Path, *overrides: str, cache: Path, **environment: str) -> subprocess.Popen[str]:
    given = [*TINY, f"data.cache_dir={cache}", f"output_dir={folder}", *overrides]
    return subprocess.Popen(
        [sys.executable, "train.py", *given],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *overrides: str, cache: Path) -> Path:
    """Return the folder of a run that finished."""
    process = start(folder, *overrides, cache=cache)
    output, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors
    return ROOT / output.splitlines()[-1].removeprefix("run: ")


def losses(folder: Path) -> list[dict[str, float]]:
    names = (
        "step",
        "tokens",
        "train/loss",
        "val/loss",
        "val/accuracy",
        "val/loss_lagged",
        "optim/grad_norm",
        "optim/lr",
    )
    return [{name: line[name] for name in names if name in line} for line in read_metrics(folder)]


def assert_equal(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    assert len(one) == len(other) > 0
    for line, same in zip(one, other, strict=True):
        assert line == pytest.approx(same, abs=1e-6, rel=1e-6)


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("procedure", PROCEDURES)
def test_two_processes_come_to_what_one_does(procedure: str, tmp_path: Path):
    chosen, cache = PROCEDURES[procedure], tmp_path / "cache"

    alone = run(tmp_path / "alone", *chosen, "runtime.num_threads=1", cache=cache)
    shared = run(tmp_path / "shared", *chosen, "runtime=ddp_cpu", cache=cache)

    assert len(list((tmp_path / "shared" / "train").iterdir())) == 1
    assert sorted(path.name for path in shared.iterdir()) == sorted(path.name for path in alone.iterdir())
    assert_equal(losses(alone), losses(shared))
    facts = read_run(shared).facts
    assert facts["status"] == "finished"
    assert facts["tokens"] == read_run(alone).facts["tokens"]
    one, two = checkpoint(alone), checkpoint(shared)
    assert one.keys() == two.keys()
    if procedure == "lct":
        assert torch.equal(one["lagged_cache"]["visits"], two["lagged_cache"]["visits"])
        difference = (one["lagged_cache"]["states"].float() - two["lagged_cache"]["states"].float()).abs().max()
        assert difference < 0.02  # one step of bf16, where the last digit of fp32 decided its rounding
    if procedure == "streaming":
        assert one["stream"]["rows"] == two["stream"]["rows"]
        for name, tensor in one["stream"]["tensors"].items():
            torch.testing.assert_close(two["stream"]["tensors"][name], tensor, atol=1e-4, rtol=1e-4)
