"""What a run says and leaves where the machine fails it: signals, a full disk, a dead loader process, too little memory."""

import multiprocessing
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from newllm.config.compose import compose
from newllm.early_signal import leave_on_sigterm
from newllm.guards.events import EVENTS_FILE, keep_events, read_events, write_event
from newllm.run import run_training
from newllm.run_record import read_run

PROBE = [
    *("model=pythia", "size.dim=16", "size.num_layers=1", "size.num_heads=2", "size.mlp_dim=32", "layers.window=1"),
    *("data=delay_copy", "data.block_length=8", "data.num_samples=40", "data.batch_size=4", "data.eval_batch_size=4"),
    *("trainer.max_steps=6", "trainer.validate_every_steps=3", "trainer.checkpoint_every_steps=2", "logger=none"),
    *("schedule.warmup_steps=1", "callbacks.lag_every_steps=null", "evaluation=[]"),
]


def train(folder: Path, *overrides: str) -> float | None:
    given = [*PROBE, f"data.cache_dir={folder.parent / 'cache'}", *overrides]
    return run_training(compose(given), folder, given)


@contextmanager
def meanwhile(work: Callable[[], bool]) -> Iterator[None]:
    """Try the work every few milliseconds in another thread until it says that it is done."""

    def keep_trying() -> None:
        while not is_over.is_set() and not work():
            time.sleep(0.002)

    is_over = threading.Event()
    thread = threading.Thread(target=keep_trying)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Refuse longer files, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_sigterm_before_the_first_step_is_told_and_recorded(tmp_path: Path, capfd: pytest.CaptureFixture):
    def stop_once_recorded() -> bool:
        has_begun = (tmp_path / "run" / "run.json").exists()
        if has_begun:
            os.kill(os.getpid(), signal.SIGTERM)
        return has_begun

    before = signal.getsignal(signal.SIGTERM)
    leave_on_sigterm()
    try:
        with meanwhile(stop_once_recorded), pytest.raises(SystemExit) as stopped:
            train(tmp_path / "run")
    finally:
        signal.signal(signal.SIGTERM, before)

    assert stopped.value.code == 143
    assert "SIGTERM: stopped while no training was under way" in capfd.readouterr().err
    facts = read_run(tmp_path / "run").facts
    assert (facts["status"], facts["exit_reason"]) == ("stopped", "told to stop before the first step")
    assert not (tmp_path / "run" / "FAILED").exists()


def test_a_full_disk_keeps_the_checkpoint_from_before_and_the_run_goes_on_later(tmp_path: Path):
    folder = tmp_path / "run"
    train(folder, "trainer=standard", "stop_at_step=2")
    saved = (folder / "checkpoints" / "last.ckpt").read_bytes()

    with (
        files_of_at_most(len(saved) // 2),
        pytest.raises(OSError, match=r"last.ckpt: cannot be written .* Make room and resume"),
    ):
        train(folder, "trainer=standard", f"resume={folder}")

    assert (folder / "checkpoints" / "last.ckpt").read_bytes() == saved
    assert "cannot be written" in (folder / "FAILED").read_text()
    assert [path for path in folder.rglob("*") if ".tmp" in path.name] == []
    train(folder, "trainer=standard", f"resume={folder}")
    assert (folder / "DONE").exists()


def test_a_loader_process_that_dies_ends_the_run_with_a_clear_error(tmp_path: Path):
    def kill_a_worker() -> bool:
        workers = [process for process in multiprocessing.active_children() if process.daemon]
        for process in workers[:1]:
            process.kill()
        return bool(workers)

    with (
        meanwhile(kill_a_worker),
        pytest.raises(RuntimeError, match=r"data.num_workers=1: a loader process has died .* resume the run"),
    ):
        train(tmp_path / "run", "trainer=standard", "data.num_workers=1", "trainer.max_steps=5000", "guards=off")

    assert "a loader process has died" in read_run(tmp_path / "run").facts["exit_reason"]


def test_a_model_larger_than_memory_is_refused_before_it_is_made(tmp_path: Path, capsys: pytest.CaptureFixture):
    started = time.monotonic()

    with pytest.raises(SystemExit) as refused:
        train(tmp_path / "run", "trainer=standard", "size.dim=400000", "size.mlp_dim=1600000")

    assert refused.value.code == 2
    said = capsys.readouterr().err
    assert re.search(r"parameters need \d[\d,.]+ GiB for weights, gradients and moments", said)
    assert re.search(
        r"GiB of free memory\. Allowed: what fits, of the named sizes [^.]*size=nano[^.]*\. Choose a smaller size", said
    )
    assert time.monotonic() - started < 60
    assert not (tmp_path / "run").exists()


def test_an_event_torn_by_a_kill_is_left_out(tmp_path: Path):
    write_event(tmp_path, {"step": 1, "event": "loss_spike"})
    with open(tmp_path / EVENTS_FILE, "a") as file:
        file.write('{"step": 2, "ev')

    keep_events(tmp_path, up_to_step=5)
    write_event(tmp_path, {"step": 3, "event": "loss_spike"})

    assert [event["step"] for event in read_events(tmp_path)] == [1, 3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no CUDA device")
@pytest.mark.parametrize(
    ("runtime", "named"),
    [("gpu", "runtime.accelerator=gpu"), ("ddp", "runtime.accelerator=gpu"), ("fsdp", "runtime.strategy=fsdp")],
)
def test_gpus_that_are_not_there_are_refused(runtime: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as refused:
        train(tmp_path / "run", "trainer=standard", f"runtime={runtime}")

    assert refused.value.code == 2
    assert f"{named}: torch finds no CUDA device. Allowed here: cpu." in capsys.readouterr().err
