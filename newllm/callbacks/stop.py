"""Stopping early without losing a step: at a signal, or at a given step."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

from lightning.pytorch import Callback, LightningModule, Trainer

from newllm.callbacks.loop import has_stepped, is_training_validation, validation_is_due

# What a shell shows for a process ended by that signal: 128 + its number.
EXIT_CODES = {"SIGTERM": 143, "SIGINT": 130}


class _Stop(Callback):
    """Ends training after the current optimizer step; the checkpoint callback then saves where it stands.

    Attributes:
        reason: why training was stopped, None while it was not.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._validation_batches: int | float | None = None

    def _stop(self, trainer: Trainer, reason: str) -> None:
        self.reason = reason
        if not validation_is_due(trainer):
            # Lightning validates whenever it is told to stop: slow after a signal, and a validation that the
            # uninterrupted run does not have would count for best.ckpt and for early stopping.
            self._validation_batches, trainer.limit_val_batches = trainer.limit_val_batches, 0
        trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._validation_batches is not None:
            trainer.limit_val_batches, self._validation_batches = self._validation_batches, None


class StopAtStep(_Stop):
    """Stops after the given optimizer step with a checkpoint, as an interruption there would.

    Args:
        step: optimizer steps, counted from the start of the run.
    """

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if has_stepped(trainer) and trainer.global_step >= self.step and not trainer.should_stop:
            self._stop(trainer, f"stop_at_step={self.step}")


class StopOnSignal(_Stop):
    """Stops after the current optimizer step when SIGTERM or Ctrl-C (SIGINT) arrives; a second Ctrl-C stops at once.

    Use it around the fit, so that the handlers are there before the data workers are forked and gone afterwards:
    `with stop: trainer.fit(...)`. `reason` is then "SIGTERM" or "SIGINT", `exit_code` what the process should return.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received: str | None = None
        self._process = os.getpid()
        self._previous: dict[signal.Signals, Any] = {}
        self._launcher: Any = None

    @property
    def exit_code(self) -> int:
        """Exit code that tells which signal stopped the run; 0 where none did."""
        return 0 if self.reason is None else EXIT_CODES[self.reason]

    def __enter__(self) -> Self:
        self._process = os.getpid()
        self._previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning has put its own SIGTERM handler in front, which would end the fit with an exception.
        if trainer.received_sigterm and self.received is None:
            self.received = "SIGTERM"
        self._launcher = trainer.strategy.launcher
        self._listen()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._heed(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_training_validation(trainer):
            self._heed(trainer)

    def _heed(self, trainer: Trainer) -> None:
        if not has_stepped(trainer) or trainer.should_stop:
            return
        # A signal reaches the ranks at different moments; they have to stop at the same step.
        if trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            self._stop(trainer, self.received or "SIGTERM")

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked data worker: batches are needed until the step is complete
        if number == signal.SIGINT and self.received is not None:
            raise SystemExit(EXIT_CODES["SIGINT"])
        self.received = signal.Signals(number).name
        if self._launcher is not None:  # the other ranks are children of this process
            self._launcher.kill(signal.Signals(number))
        # Not print(): a signal may arrive in the middle of one.
        os.write(2, f"\n{self.received}: stopping after this optimizer step, then saving\n".encode())
