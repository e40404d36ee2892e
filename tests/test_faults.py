"""What a run says and leaves where the machine fails it: signals, a full disk, a dead loader process, too little memory."""

import errno
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from newllm.config.compose import compose
from newllm.config.library import conf_folder
from newllm.early_signal import leave_on_signal
from newllm.ending import NotSaved, told_in_words
from newllm.guards.events import EVENTS_FILE, keep_events, read_events, write_event
from newllm.guards.verdict import GuardFailure, Verdict
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


def run_program(program: str, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run train.py or evaluate.py in the folder."""
    return subprocess.run(
        [sys.executable, str(conf_folder().parent / program), *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize(
    ("reached", "status", "reason"),
    [
        ("run.json", "stopped", "told to stop before the first step"),
        ("DONE", "finished", "trainer.max_steps=6 made"),
    ],
)
def test_a_signal_outside_training_is_told_and_recorded(
    reached: str, status: str, reason: str, number: int, code: int, tmp_path: Path, capfd: pytest.CaptureFixture
):
    def stop_once_reached() -> bool:
        is_reached = (tmp_path / "run" / reached).exists()
        if is_reached:
            os.kill(os.getpid(), number)
        return is_reached

    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    leave_on_signal()
    try:
        with meanwhile(stop_once_reached), pytest.raises(SystemExit) as stopped:
            train(tmp_path / "run", "trainer=standard", "evaluation=[perplexity]")
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)

    assert stopped.value.code == code
    assert f"{signal.Signals(number).name}: stopped while no training was under way" in capfd.readouterr().err
    facts = read_run(tmp_path / "run").facts
    assert (facts["status"], facts["exit_reason"]) == (status, reason)
    assert not (tmp_path / "run" / "FAILED").exists()


@pytest.mark.parametrize("program", ["train.py", "evaluate.py"])
def test_ctrl_c_during_the_imports_ends_without_a_traceback_and_leaves_nothing(program: str, tmp_path: Path):
    (tmp_path / "hydra.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")

    ended = run_program(program, tmp_path, PYTHONPATH=str(tmp_path))

    assert ended.returncode == 130
    assert ended.stderr.strip() == "SIGINT: stopped while no training was under way, so there was nothing to save"


def test_ctrl_c_while_torch_is_imported_leaves_no_empty_folder(tmp_path: Path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")

    ended = run_program("train.py", tmp_path, "debug=fast", "output_dir=outputs", PYTHONPATH=str(tmp_path))

    assert (ended.returncode, "Traceback" in ended.stderr) == (130, False)
    assert not list((tmp_path / "outputs").glob("*/*"))


def test_a_second_ctrl_c_is_recorded_as_a_stop(tmp_path: Path):
    def interrupt_twice() -> bool:
        is_training = (tmp_path / "run" / "metrics.jsonl").exists()
        if is_training:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)
        return is_training

    steps = ("trainer.max_steps=100000", "trainer.validate_every_steps=50000", "trainer.log_every_steps=1")
    with meanwhile(interrupt_twice), pytest.raises(SystemExit) as stopped:
        train(tmp_path / "run", "trainer=standard", "trainer.checkpoint_every_steps=100000", *steps)

    assert stopped.value.code == 130
    assert read_run(tmp_path / "run").facts["status"] == "stopped"


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


def test_a_disk_too_small_for_the_first_checkpoint_leaves_nothing_to_resume(tmp_path: Path):
    with (
        files_of_at_most(20_000),
        pytest.raises(NotSaved, match=r"There is none from before\. Make room and start the run again\.$"),
    ):
        train(tmp_path / "run", "trainer=standard")


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (
            GuardFailure(
                [Verdict("a", "failed", "One."), Verdict("b", "passed", "Two."), Verdict("c", "failed", "Three.")]
            ),
            "newllm: a guard failed, the run gives no number:\n  - One.\n  - Three.\n",
        ),
        (NotSaved("Make room."), "newllm: the run could not go on:\n  - Make room.\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"),
            "newllm: the run could not go on:\n  - metrics.jsonl: cannot be written (No space left on device). "
            "Allowed: a folder with room. Make room, then resume the run or start it again.\n",
        ),
    ],
)
def test_an_expected_end_is_told_without_a_traceback(error: Exception, lines: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended, told_in_words():
        raise error

    assert (ended.value.code, capsys.readouterr().err) == (1, lines)


def test_other_errors_keep_their_traceback():
    with pytest.raises(FileNotFoundError), told_in_words():
        raise FileNotFoundError(errno.ENOENT, "No such file", "x")


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
