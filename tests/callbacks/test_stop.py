import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tiny_run import TinyModule, fit

from newllm.callbacks.checkpoints import Checkpoints
from newllm.callbacks.stop import StopAtStep, StopOnSignal

CHILD = """
import sys, time
from lightning.pytorch import Callback
from tiny_run import TinyModule, fit
from newllm.callbacks.checkpoints import Checkpoints
from newllm.callbacks.stop import StopOnSignal

class Slow(Callback):
    def on_train_batch_start(self, trainer, *_):
        print("step", trainer.global_step, flush=True)
        time.sleep(0.05)

if __name__ == "__main__":
    checkpoints, stop = Checkpoints(sys.argv[1], every_steps=10_000), StopOnSignal()
    with stop:
        trainer = fit(TinyModule(), [Slow(), stop, checkpoints], max_steps=10_000, validate_every_batches=10_000, num_workers=2)
    print("saved", checkpoints.last_step, "of", trainer.global_step, stop.reason, flush=True)
    sys.exit(stop.exit_code)
"""


class Kill(Callback):
    """Sends this process a signal in the middle of a training step or of a validation."""

    def __init__(self, *, step: int, number: signal.Signals = signal.SIGTERM, in_validation: bool = False) -> None:
        self.step = step
        self.number = number
        self.in_validation = in_validation

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.in_validation:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and self.in_validation:
            os.kill(os.getpid(), self.number)


class Validations(Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps.append(trainer.global_step)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_killed_process_saves_and_tells(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """A real signal to a whole process group, data workers included, as a cluster or a terminal sends it."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[2]}"}
    child = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "checkpoints")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert child.stdout is not None
    while child.stdout.readline() != "step 3\n":
        assert child.poll() is None
    time.sleep(0.02)

    os.killpg(child.pid, number)
    out, err = child.communicate(timeout=60)

    last = out.splitlines()[-1].split()
    assert child.returncode == code, err
    assert last[1] == last[3]
    assert last[4] == number.name
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == int(last[1])
    assert f"{number.name}: stopping after this optimizer step, then saving" in err


def test_signal_stops_after_the_step_without_an_extra_validation(tmp_path: Path) -> None:
    stop, checkpoints, validations = StopOnSignal(), Checkpoints(tmp_path, every_steps=100), Validations()

    with stop:
        trainer = fit(TinyModule(), [Kill(step=4), validations, stop, checkpoints], max_steps=20)

    assert (stop.reason, stop.exit_code) == ("SIGTERM", 143)
    assert trainer.global_step == checkpoints.last_step == 5
    assert validations.steps == [3]
    assert trainer.limit_val_batches == 1.0


def test_signal_within_an_accumulation_waits_for_the_optimizer_step(tmp_path: Path) -> None:
    stop, checkpoints = StopOnSignal(), Checkpoints(tmp_path, every_steps=100)

    with stop:
        trainer = fit(TinyModule(), [Kill(step=1), stop, checkpoints], max_steps=20, accumulate=2, train_blocks=20)

    assert trainer.fit_loop.epoch_loop.total_batch_idx + 1 == 4
    assert checkpoints.last_step == 2


def test_signal_during_validation_stops_when_it_ends(tmp_path: Path) -> None:
    stop, checkpoints, validations = StopOnSignal(), Checkpoints(tmp_path, every_steps=100), Validations()

    with stop:
        trainer = fit(TinyModule(), [Kill(step=3, in_validation=True), validations, stop, checkpoints], max_steps=20)

    assert trainer.global_step == checkpoints.last_step == 3
    assert validations.steps == [3]


def test_interrupted_run_continues_bit_for_bit_after_a_signal(tmp_path: Path) -> None:
    straight, parts = TinyModule(), TinyModule()
    fit(straight, [Checkpoints(tmp_path / "straight", every_steps=100)], max_steps=12)

    stop, checkpoints = StopOnSignal(), Checkpoints(tmp_path / "parts", every_steps=100)
    with stop:
        fit(TinyModule(), [Kill(step=6), stop, checkpoints], max_steps=12)
    fit(parts, [checkpoints], max_steps=12, resume=checkpoints.last_path)

    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), parts.parameters(), strict=True))


def test_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    class Impatient(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    stop = StopOnSignal()

    with stop, pytest.raises(SystemExit):
        fit(TinyModule(), [Impatient(), stop, Checkpoints(tmp_path, every_steps=100)], max_steps=20)

    assert not (tmp_path / "last.ckpt").exists()


def test_handlers_are_those_of_before_when_training_is_over(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stop = StopOnSignal()

    with stop:
        fit(TinyModule(), [stop, Checkpoints(tmp_path, every_steps=100)], max_steps=2)

    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert (stop.reason, stop.exit_code) == (None, 0)


def test_stop_at_step_tells_why(tmp_path: Path) -> None:
    stop, checkpoints = StopAtStep(2), Checkpoints(tmp_path, every_steps=100)

    trainer = fit(TinyModule(), [stop, checkpoints], max_steps=20)

    assert stop.reason == "stop_at_step=2"
    assert trainer.global_step == checkpoints.last_step == 2
