"""Real configurations, data, models and training procedures, small enough to run whole in every test of the guards."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import Precision
from torch import Tensor

from newllm.callbacks.loop import validate_every
from newllm.config.compose import compose
from newllm.config.schema import TrainConfig
from newllm.config.typed import real_config
from newllm.data.module import TextDataModule, build_data
from newllm.guards.monitor import Monitor
from newllm.guards.preflight import run_preflight
from newllm.guards.verdict import Verdict
from newllm.models.base import LanguageModel
from newllm.models.create import build_model
from newllm.trainers.base import TrainingModule
from newllm.trainers.build import build_training_module

WORDS = ["sun", "moon", "river", "stone", "bird", "song", "night", "fire", "winter", "seed"]
SMALL = (
    *("size.dim=16", "size.num_layers=2", "size.num_heads=2", "size.mlp_dim=24"),
    *("data.block_length=12", "data.batch_size=4", "data.max_train_blocks=40", "data.max_validation_blocks=8"),
    *("data.validation_share=0.3", "schedule=constant", "schedule.warmup_steps=0"),
    *("optimizer.lr=0.003", "trainer.max_steps=12", "trainer.validate_every_steps=6"),
    *("trainer.checkpoint_every_steps=6", "guards.spike_window=10"),
)
INFINI = ("model=infini", "layers.segment_length=8")
FEEDBACK = (*INFINI, "trainer=lct")


def write_texts(path: Path, *, num_documents: int = 20, seed: int = 0) -> Path:
    """Write a corpus of different texts, one JSON object per line."""
    generator = random.Random(seed)
    texts = [" ".join(generator.choice(WORDS) for _ in range(30)) for _ in range(num_documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def configure(folder: Path, *overrides: str) -> TrainConfig:
    """Return the configuration of a small run, on texts in the folder unless another source is named."""
    source = [f"data.cache_dir={folder / 'cache'}"]
    if not any(override.startswith("data=") for override in overrides):
        path = folder / "texts.jsonl"
        if not path.exists():
            write_texts(path)
        source += ["data=jsonl", f"data.path={path}", "data.max_unseen=1", "tokenizer=bytes"]
    return real_config(compose([*SMALL, *source, *overrides]))


def prepare(config: TrainConfig) -> TextDataModule:
    """Return a configuration's data, prepared."""
    data = build_data(config)
    data.prepare()
    return data


def alter(data: TextDataModule, **changes: Any) -> TextDataModule:
    """Return the data module with facts of its prepared data replaced."""
    data._prepared = replace(data.prepared, **changes)
    return data


def first_batch(data: TextDataModule) -> dict[str, Tensor]:
    """Return the batch that training would begin with."""
    return next(iter(data.train_dataloader()))


def make_model(config: TrainConfig, data: TextDataModule) -> LanguageModel:
    """Return a configuration's model, the same at each call."""
    torch.manual_seed(0)
    return build_model(config, data.vocab_size)


def preflight(folder: Path, *overrides: str, change: Any = None) -> dict[str, Verdict]:
    """Return the verdicts on a small run by name, its model changed by `change(model)`."""
    config = configure(folder, *overrides)
    data = prepare(config)
    model = make_model(config, data)
    if change is not None:
        change(model)
    return verdicts_on(model, data, config)


def verdicts_on(model: LanguageModel, data: TextDataModule, config: TrainConfig) -> dict[str, Verdict]:
    """Return all verdicts before step 0, by name."""
    found = run_preflight(model, first_batch(data), data, data.tokenizer, config.guards, seed=1)
    return {verdict.name: verdict for verdict in found}


def failed(verdicts: dict[str, Verdict]) -> list[str]:
    """Return the names of the guards that failed."""
    return [name for name, verdict in verdicts.items() if verdict.status == "failed"]


class KeepWeights(Callback):
    """Keeps a copy of all weights after every optimizer step, by step; 0 is before the first."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, Tensor]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._keep(trainer, pl_module)

    def moved(self, step: int) -> bool:
        """Whether the step changed any weight."""
        before, after = self.after[step - 1], self.after[step]
        return any(not torch.equal(before[name], after[name]) for name in before)

    def _keep(self, trainer: Trainer, module: LightningModule) -> None:
        weights = module.state_dict()
        self.after[trainer.global_step] = {name: value.detach().clone() for name, value in weights.items()}


class SmallRun:
    """One training run as the program makes it: the real procedure, data and guards.

    Args:
        folder: holds the texts and the run folder.
        *overrides: of the configuration.
        floor: keep the text's floor; without it no leak is looked for.
    """

    def __init__(self, folder: Path, *overrides: str, floor: bool = False) -> None:
        self.config = configure(folder, *overrides)
        self.folder = folder / "run"
        self.folder.mkdir(exist_ok=True)
        self.data = prepare(self.config)
        self.module: TrainingModule = build_training_module(
            make_model(self.config, self.data),
            self.config,
            self.data.token_bytes,
            num_samples=self.data.num_train_samples,
            folder=self.folder,
        )
        floor_nats = self.data.facts["floor_nats_per_token"] if floor else None
        self.monitor = Monitor(self.config.guards, self.folder, floor_nats=floor_nats)
        self.weights = KeepWeights()

    def fit(
        self,
        *callbacks: Callback,
        resume: Path | None = None,
        max_steps: int | None = None,
        accelerator: str = "cpu",
        plugins: Precision | None = None,
    ) -> "SmallRun":
        """Train; further callbacks come before the guards."""
        options = self.config.trainer
        self.trainer = Trainer(
            accelerator=accelerator,
            devices=1,
            plugins=plugins,
            max_steps=options.max_steps if max_steps is None else max_steps,
            max_epochs=-1,
            accumulate_grad_batches=options.accumulate_batches,
            val_check_interval=1,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            callbacks=[*callbacks, self.monitor, self.weights],
            logger=False,
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        validate_every(self.trainer, options.validate_every_steps)
        self.trainer.fit(self.module, datamodule=self.data, ckpt_path=resume)
        return self

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """What the monitor found, by name."""
        return {verdict.name: verdict for verdict in self.monitor.verdicts()}
