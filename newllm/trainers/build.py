"""From a configuration to a training procedure."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

from torch import Tensor

from newllm.config.schema import TrainConfig
from newllm.data.module import TextDataModule
from newllm.models.base import LanguageModel
from newllm.trainers.base import TrainingModule


def training_module_class(kind: str) -> type[TrainingModule]:
    """Return the procedure that newllm/trainers/<kind>.py defines."""
    module = importlib.import_module(f"newllm.trainers.{kind}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, TrainingModule) and value.__module__ == module.__name__
    ]
    assert len(found) == 1, f"newllm/trainers/{kind}.py must define one TrainingModule, it defines {len(found)}"
    return found[0]


def build_training_module(
    model: LanguageModel,
    config: TrainConfig,
    token_bytes: Tensor,
    *,
    num_samples: int,
    folder: Path,
    data: TextDataModule | None = None,
) -> TrainingModule:
    """Return the procedure with the model and the loss that the configuration names.

    Args:
        model: the model to train.
        config: the whole configuration.
        token_bytes: UTF-8 bytes of every token [V].
        num_samples: training samples.
        folder: run folder.
        data: prepared, for a procedure that reads its text in another way than block by block.
    """
    loss = importlib.import_module(f"newllm.losses.{config.loss.kind}").build(config.loss)
    kind = training_module_class(config.trainer.kind)
    offered = {"num_samples": num_samples, "folder": folder, "data": data}
    wanted = {name: value for name, value in offered.items() if name in inspect.signature(kind).parameters}
    return kind(model, loss, config, token_bytes, **wanted)
