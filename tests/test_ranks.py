"""Several processes, one run: the same folder, the same losses, the same refusals."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from newllm.config.compose import ConfigError, compose
from newllm.config.schema import RuntimeConfig
from newllm.hardware import warn_of_loss
from newllm.launch import Place, joined, place_of
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
        "val/loss_memory_off",
        "val/loss_other_memory",
        "val/loss_own_memory",
        "val/other_memory_share",
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


@pytest.mark.slow
def test_a_sweep_of_shared_jobs_makes_one_folder_per_job(tmp_path: Path):
    process = start(tmp_path, *PROCEDURES["standard"], "runtime=ddp_cpu", "-m", "seed=0,1", cache=tmp_path / "cache")
    _, errors = process.communicate(timeout=280)

    assert process.returncode == 0, errors
    folders = sorted(path for path in (tmp_path / "train").iterdir() if path.is_dir())
    assert [sorted({"DONE", "log.txt"} & {path.name for path in folder.iterdir()}) for folder in folders] == [
        ["DONE", "log.txt"]
    ] * 2


@pytest.mark.slow
def test_ranks_that_disagree_are_refused_with_the_difference(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    ranks = [
        start(
            *(tmp_path, *PROCEDURES["standard"], "runtime=ddp_cpu", f"trainer.max_steps={8 + rank}"),
            cache=tmp_path / "cache",
            **torchrun,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in range(2)
    ]

    said = [process.communicate(timeout=250)[1] for process in ranks]

    assert [process.returncode for process in ranks] == [2, 2], said
    assert "trainer.max_steps=9: rank 1 was given it, rank 0 has 8. Allowed: one configuration" in said[0]
    assert not (tmp_path / "train").exists()


@pytest.mark.parametrize("port_is_told", [True, False])
def test_a_port_in_use_is_refused_with_its_number(port_is_told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        if port_is_told:  # as torchrun does
            told = {**TORCHRUN, "RANK": "0", "GROUP_RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
            for name, value in {**told, "MASTER_PORT": str(port)}.items():
                monkeypatch.setenv(name, value)
        else:
            monkeypatch.setattr("newllm.launch.find_free_network_port", lambda: port)
        before = dict(os.environ)

        with (
            pytest.raises(ValueError, match=rf"MASTER_PORT={port}: rank 0 cannot meet the others there \(.*EADDRINUSE"),
            joined(compose(["runtime=ddp_cpu"]), tmp_path / "run", []),
        ):
            pass

    assert dict(os.environ) == before
    assert not torch.distributed.is_initialized()


def endless(folder: Path) -> tuple[subprocess.Popen[str], psutil.Process, Path]:
    """Return rank 0 and rank 1 of a run that does not end by itself, and its folder, once it has a checkpoint."""
    steps = ["trainer.max_steps=100000", "trainer.validate_every_steps=100000", "schedule=constant"]
    first = start(folder, *PROCEDURES["standard"], "runtime=ddp_cpu", *steps, cache=folder / "cache")
    while not (saved := list(folder.glob("train/*/checkpoints/last.ckpt"))):
        assert first.poll() is None, first.communicate()
        time.sleep(0.1)
    (other,) = psutil.Process(first.pid).children()
    return first, other, saved[0].parents[1]


@pytest.mark.slow
def test_a_rank_does_not_outlive_the_first(tmp_path: Path):
    first, other, _ = endless(tmp_path)

    first.kill()
    first.communicate(timeout=60)

    other.wait(60)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_which_goes_on_later(tmp_path: Path):
    first, other, folder = endless(tmp_path)

    other.kill()
    said = first.communicate(timeout=60)[1]
    reached = checkpoint(folder)["global_step"]
    go_on = [sys.executable, "train.py", f"resume={folder}", f"stop_at_step={reached + 2}"]
    again = subprocess.run(go_on, cwd=ROOT, capture_output=True, text=True)

    assert first.returncode == 1, said
    assert "rank 1 was killed by SIGKILL: the run cannot go on without it" in said
    assert again.returncode == 0, again.stderr
    assert checkpoint(folder)["global_step"] >= reached + 2


DEVICES_2: RuntimeConfig = compose(["runtime=ddp_cpu"]).runtime
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
}
SLURM = {"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}


@pytest.mark.parametrize("environment", [TORCHRUN, SLURM], ids=["torchrun", "slurm"])
def test_a_process_finds_the_place_it_was_given(environment: dict[str, str]):
    assert place_of(DEVICES_2, environment) == Place(rank=3, local_rank=1, node=1, world_size=4, starts_others=False)


def test_a_process_alone_starts_the_others():
    assert place_of(DEVICES_2, {}) == Place(rank=0, local_rank=0, node=0, world_size=2, starts_others=True)
    assert place_of(DEVICES_2, SLURM | {"SLURM_JOB_NAME": "bash"}).starts_others
    assert place_of(DEVICES_2, {"NEWLLM_RANK": "1"}) == Place(1, 1, 0, 2, starts_others=False)
    assert place_of(compose([]).runtime, {}) == Place(0, 0, 0, 1, starts_others=False)


@pytest.mark.parametrize("environment", [TORCHRUN, SLURM], ids=["torchrun", "slurm"])
def test_another_number_of_processes_is_refused(environment: dict[str, str]):
    with pytest.raises(ValueError, match=r"runtime.devices=1: \w+ started 2 processes on this machine. Allowed: 2"):
        place_of(compose([]).runtime, environment)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["data.batch_size=3"], "data.batch_size=3: cannot be shared out among the 4 processes of all machines"),
        (
            ["trainer=cvfp_phase1", "model=context", "runtime.devices=1"],
            "trainer=cvfp_phase1: runs in one process, 4 were",
        ),
    ],
)
def test_processes_of_several_machines_that_the_run_cannot_use_are_refused(
    overrides: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = compose(["runtime=ddp_cpu", *overrides])
    started = TORCHRUN | {"LOCAL_WORLD_SIZE": str(config.runtime.devices)}
    for name, value in started.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(ValueError, match=named), joined(config, tmp_path, []):
        pass


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["runtime.strategy=fsdp"], "runtime.strategy=fsdp: shards over GPUs"),
        (["runtime.precision=16-mixed"], "runtime.precision=16-mixed: is for GPUs"),
        (["runtime=fsdp", "runtime.compile=true"], "runtime.compile=true: sharded layers are not compiled"),
        (["runtime=ddp_cpu", "data.batch_size=1"], "data.batch_size=1: cannot be shared out among runtime.devices=2"),
        (["runtime=ddp_cpu", "trainer=cvfp_phase1", "model=context"], "trainer=cvfp_phase1 runs in one process"),
    ],
)
def test_what_devices_cannot_do_is_refused(overrides: list[str], named: str):
    with pytest.raises(ConfigError, match=named):
        compose(overrides)


@pytest.mark.parametrize(
    ("overrides", "flags", "said"),
    [
        (["runtime.compile=true"], "avx2", ["runtime.compile=true: compiling takes minutes on a CPU"]),
        (["runtime.precision=bf16-mixed"], "avx2", ["runtime.precision=bf16-mixed: this CPU has no instructions for"]),
        (["runtime.precision=bf16-mixed"], "avx2 avx512_bf16", []),
        ([], "avx2", []),
    ],
)
def test_what_does_not_pay_is_said(overrides, flags: str, said: list[str], caplog, tmp_path: Path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}")
    monkeypatch.setattr("newllm.processor.CPU_INFO", tmp_path / "cpuinfo")

    warn_of_loss(compose(overrides).runtime)

    assert [message.partition(" bf16,")[0].partition(" and gains")[0] for message in caplog.messages] == said


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="FSDP shards over two or more CUDA devices")
def test_fsdp_comes_to_what_one_gpu_does(tmp_path: Path):
    exact = ["model=infini", "trainer=standard", "runtime.precision=32-true"]

    alone = run(tmp_path / "alone", *exact, "runtime=gpu", "runtime.compile=false", cache=tmp_path / "cache")
    shared = run(tmp_path / "shared", *exact, "runtime=fsdp", cache=tmp_path / "cache")

    for line, same in zip(losses(alone), losses(shared), strict=True):
        assert line == pytest.approx(same, abs=1e-3)
