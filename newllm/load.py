"""A finished run, read back from its folder alone."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from newllm.config.compose import read_config
from newllm.config.schema import TrainConfig
from newllm.config.typed import real_config
from newllm.data.module import TextDataModule, build_data
from newllm.data.tokenizer import Tokenizer, load_tokenizer
from newllm.data.tokenizer_kinds import saved_tokenizer
from newllm.models.base import LanguageModel
from newllm.models.create import build_model
from newllm.run_record import read_metrics, read_run

CheckpointName = Literal["best", "last"]


@dataclass(frozen=True)
class LoadedRun:
    """A run folder brought back to life.

    Attributes:
        folder: where it lies.
        config: its configuration.
        model: its model with the checkpoint's weights, in evaluation mode.
        metrics: what the run logged at the checkpoint's step, by metric name; empty where it did not validate there.
        facts: contents of run.json.
        step: optimizer steps behind the weights.
        checkpoint: which of the run's weights they are.
    """

    folder: Path
    config: TrainConfig
    model: LanguageModel
    metrics: dict[str, float]
    facts: dict[str, Any]
    step: int
    checkpoint: CheckpointName

    @cached_property
    def data(self) -> TextDataModule:
        """The run's data, as `read_data` gives them."""
        return self.read_data()

    def read_data(self, *, batch_size: int | None = None) -> TextDataModule:
        """Return the run's data, cut as they were; tokenised texts come from the cache folder or are made again.

        Args:
            batch_size: blocks of a batch of held-out text; None takes the run's own.
        Raises:
            ValueError: the text has changed, or is not there.
        """
        config = self.config
        if batch_size is not None:
            config = replace(config, data=replace(config.data, eval_batch_size=batch_size))
        data = build_data(config, tokenizer_file=self.tokenizer_file)
        data.prepare()
        expected = self.facts.get("data_fingerprint")
        if expected is not None and data.fingerprint != expected:
            raise ValueError(
                f"{self.folder}: was trained on other data (fingerprint {expected}, the source now gives {data.fingerprint}). "
                "Allowed: the same texts. Bring back the files or the package version of the run (run.json lists it)."
            )
        return data

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer the run has saved; None where its data are token ids."""
        file = self.folder / "tokenizer.json"
        return file if file.is_file() else None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's own tokenizer, from its folder; of a run on token ids there is none, and its file is missed."""
        file = self.folder / "tokenizer.json"
        return load_tokenizer(file, vocab_size=saved_tokenizer(self.config.tokenizer, file).vocab_size)


def checkpoint_path(folder: Path, which: CheckpointName) -> Path:
    """Return the path of a run's checkpoint.

    Raises:
        ValueError: there is none.
    """
    path = folder / "checkpoints" / f"{which}.ckpt"
    if not path.is_file():
        found = sorted(file.name for file in (folder / "checkpoints").glob("*.ckpt"))
        raise ValueError(
            f"{path}: is missing. Allowed: a run folder with a checkpoint (found: {', '.join(found) or 'none'}). "
            "Train longer than trainer.checkpoint_every_steps, or name another run."
        )
    return path


def read_checkpoint(path: Path, *, advice: str) -> dict[str, Any]:
    """Return a checkpoint's contents on the CPU; nothing but plain containers and tensors is ever unpickled.

    Args:
        path: file that train.py wrote.
        advice: what to do if it is damaged, a sentence.
    Raises:
        ValueError: the file is damaged.
    """
    try:
        # torch reads over a changed byte; the archive's checksums tell.
        with zipfile.ZipFile(path) as archive:
            torn = archive.testzip()
        if torn is not None:
            raise zipfile.BadZipFile(f"checksum of {torn}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path}: is damaged ({first_line}). Allowed: a checkpoint that train.py wrote. {advice}"
        ) from error


def resumed_checkpoint(folder: Path, *, stop_at_step: int | None = None) -> Path:
    """Return the path of the checkpoint that a run goes on from, found whole.

    Raises:
        ValueError: there is none, it is damaged, or the run is to stop at a step that it has made.
    """
    path = checkpoint_path(folder, "last")
    best = path.with_name("best.ckpt")
    kept = f" What it had learned is still in {best}." if best.is_file() else ""
    advice = f"No run goes on from another one: start the run again without resume.{kept}"
    made = read_checkpoint(path, advice=advice)["global_step"]
    if stop_at_step is not None and stop_at_step <= made:
        raise ValueError(
            f"stop_at_step={stop_at_step}: the run has made {made} steps already. Allowed: more than {made}, or null. "
            "Raise it or leave it out."
        )
    return path


def load_run(folder: str | Path, checkpoint: CheckpointName = "best") -> LoadedRun:
    """Return a run from its folder: configuration, model with trained weights, tokenizer, logged metrics.

    Args:
        folder: run folder that train.py wrote.
        checkpoint: "best" by validation loss, or "last".
    Raises:
        ValueError: no run there, a damaged record, no checkpoint, a damaged one, or one whose weights this version does not have.
    """
    record = read_run(folder)
    config = real_config(read_config(record.folder / "config.yaml"))
    path = checkpoint_path(record.folder, checkpoint)
    vocab_size = record.facts.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise ValueError(
            f"{record.folder / 'run.json'}: has no vocab_size. Allowed: what train.py wrote. Bring back the run's own, or train again."
        )
    other: CheckpointName = "last" if checkpoint == "best" else "best"
    use_other = (
        f"Use {other}.ckpt (checkpoint={other}) or train" if path.with_name(f"{other}.ckpt").is_file() else "Train"
    )
    contents = read_checkpoint(path, advice=f"{use_other} again.")
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in contents["state_dict"].items()
        if name.startswith("model.")
    }
    model = build_model(config, vocab_size)
    # A run in float64 keeps its digits.
    model.to(next(iter(weights.values())).dtype)
    differing = sorted(weights.keys() ^ model.state_dict().keys())
    if differing:
        raise ValueError(
            f"{path}: was trained by another version of newllm, {len(differing)} weights have other names ({differing[0]} and so on). "
            "Allowed: a run of this version. Evaluate it with the version whose commit its run.json names, or train again."
        )
    model.load_state_dict(weights)
    step = contents["global_step"]
    metrics = next((line for line in reversed(read_metrics(folder)) if line["step"] == step and "val/loss" in line), {})
    return LoadedRun(record.folder, config, model.eval(), metrics, record.facts, step, checkpoint)


def newest_step(run: LoadedRun) -> int:
    """Return the optimizer steps behind the weights that the run's checkpoint holds now: training may have gone on."""
    path = checkpoint_path(run.folder, run.checkpoint)
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)["global_step"]
