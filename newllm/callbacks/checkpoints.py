"""Checkpoints: last.ckpt to go on from, best.ckpt to keep."""

import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from newllm.callbacks.loop import has_stepped, is_training_validation, validation_is_due
from newllm.ending import NotSaved
from newllm.whole_file import link_whole, remove_leftovers, whole_file


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and reads only plain containers and tensors (`weights_only`)."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        assert storage_options is None, "local files have no storage options"
        path = Path(path)
        try:
            with whole_file(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch wraps the errors of its zip writer
            is_first = not path.with_name("last.ckpt").exists()
            advice = (
                "There is none from before. Make room and start the run again."
                if is_first
                else "The one from before is whole and stays. Make room and resume the run."
            )
            raise NotSaved(
                f"{path}: cannot be written ({error}). Allowed: a folder with room for the checkpoint. {advice}"
            ) from error

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: is no checkpoint. Allowed: a file that a run saved. Check the path.")
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{path}: is damaged or no checkpoint ({error}). Allowed: a file that a run saved. "
                "Use another checkpoint of the run, or train again."
            ) from error


class Checkpoints(Checkpoint):
    """Saves last.ckpt every n optimizer steps and when training ends or stops, best.ckpt when the monitor improves.

    Resuming from last.ckpt repeats nothing and skips nothing: where a validation follows the step, the checkpoint is
    written after it. Lightning calls the module's own `on_train_batch_end` after the callbacks': what a checkpoint must
    hold has to be up to date before, in `training_step` or the optimizer's hooks.

    Args:
        folder: where last.ckpt and best.ckpt go.
        every_steps: optimizer steps from one last.ckpt to the next.
        monitor: metric that best.ckpt minimises, logged by every validation; None where the newest weights are the best.
    """

    def __init__(self, folder: str | Path, *, every_steps: int, monitor: str | None = "val/loss") -> None:
        self.folder = Path(folder)
        self.every_steps = every_steps
        self.monitor = monitor
        self.best_value: float | None = None
        self.best_step: int | None = None
        self.last_step: int | None = None
        self._is_owed = False
        self._is_complete = True

    @property
    def last_path(self) -> Path:
        """Where the newest checkpoint is."""
        return self.folder / "last.ckpt"

    @property
    def best_path(self) -> Path:
        """Where the checkpoint with the lowest monitored value is."""
        return self.folder / "best.ckpt"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = WholeCheckpointIO()
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Half an accumulation is not in a checkpoint: saved there, a resumed run would differ.
        self._is_complete = has_stepped(trainer)
        if not self._is_complete:
            return
        step = trainer.global_step
        self._is_owed = step % self.every_steps == 0 or step == trainer.max_steps or trainer.should_stop
        # A stopping run may have seconds to live: it saves now, and once more after the validation it owes.
        if self._is_owed and (trainer.should_stop or not validation_is_due(trainer)):
            self._save_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_training_validation(trainer):
            return
        has_improved = self._note_best(trainer)
        if self._is_complete and (has_improved or self._is_owed or trainer.should_stop):
            self._save_last(trainer)
            if has_improved and trainer.is_global_zero:
                link_whole(self.last_path, self.best_path)
        elif has_improved:
            trainer.save_checkpoint(self.best_path)

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_value, self.best_step = state_dict["best_value"], state_dict["best_step"]

    def _save_last(self, trainer: Trainer) -> None:
        self._is_owed = False
        trainer.save_checkpoint(self.last_path)
        self.last_step = trainer.global_step

    def _note_best(self, trainer: Trainer) -> bool:
        """Return whether the monitor is the lowest so far, the same on every rank."""
        if self.monitor is None:
            return self._is_owed or trainer.should_stop
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            raise ValueError(
                f"monitor={self.monitor!r}: is not logged by validation. Allowed: {', '.join(sorted(metrics))}. "
                "Log it in validation_step, or monitor one of these."
            )
        value = trainer.strategy.broadcast(metrics[self.monitor].item())
        if math.isnan(value) or (self.best_value is not None and value >= self.best_value):
            return False
        self.best_value, self.best_step = value, trainer.global_step
        return True
