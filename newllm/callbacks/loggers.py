"""The places besides metrics.jsonl to which a run's numbers go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from newllm.callbacks.csv_table import CsvTable
from newllm.callbacks.logger import Logger
from newllm.callbacks.tensorboard import TensorBoard
from newllm.callbacks.weights_and_biases import WeightsAndBiases
from newllm.config.schema import LoggerConfig


def build_loggers(chosen: LoggerConfig, folder: Path, settings: dict[str, Any]) -> list[Logger]:
    """Return the loggers that a configuration chooses.

    Args:
        chosen: which.
        folder: run folder.
        settings: the whole configuration in plain containers, for those that keep it.
    """
    found: list[Logger] = []
    if chosen.tensorboard:
        found.append(TensorBoard(folder / "tensorboard"))
    if chosen.csv:
        found.append(CsvTable(folder / "metrics.csv"))
    if chosen.wandb:
        found.append(WeightsAndBiases(folder, settings))
    return found
