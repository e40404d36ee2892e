"""What a finished phase 1 hands over to phase 2: its context block, and the contexts it came to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from newllm.config.first_phase import of_another, phase1_folder, phase1_problems
from newllm.config.schema import TrainConfig
from newllm.data.module import TextDataModule
from newllm.load import checkpoint_path, read_checkpoint
from newllm.models.context import ContextLM
from newllm.run_record import read_run


@dataclass(frozen=True)
class FirstPhase:
    """A finished phase 1.

    Attributes:
        context_block: its weights, by name within the block.
        contexts: of the last layer, swept clean [N, C]; None where they were too many for a checkpoint.
        facts: where it lies, its steps and what it found, in plain values.
    """

    context_block: dict[str, Tensor]
    contexts: Tensor | None
    facts: dict[str, Any]


def read_first_phase(folder: Path, config: TrainConfig, data: TextDataModule, model: ContextLM) -> FirstPhase:
    """Return what a phase 1 hands over.

    Args:
        folder: of a run of trainer=cvfp_phase1 or cvfp.
        config: of phase 2.
        data: of phase 2, prepared.
        model: of phase 2, with its embedding.
    Raises:
        ValueError: there is no such run, it has not finished, or it is of another model or text; the message names the difference.
    """
    problems = phase1_problems(folder, config)
    if problems:
        raise ValueError(" ".join(problems))
    inside = phase1_folder(folder)
    facts = read_run(inside).facts
    contents = read_checkpoint(checkpoint_path(inside, "last"), advice="Make phase 1 again, or name another run of it.")
    differences = _different_data(facts, data)
    if config.resume is None:  # a resumed run's embedding comes with its checkpoint
        differences += _different_embedding(contents["state_dict"], model)
    if differences:
        raise ValueError(of_another(folder, differences))
    prefix = "model.context_block."
    block = {
        name.removeprefix(prefix): part for name, part in contents["state_dict"].items() if name.startswith(prefix)
    }
    told = {name: facts.get(name) for name in ("exit_reason", "wall_seconds", "metrics", "contexts")}
    told |= {"folder": str(inside), "iterations": contents["global_step"]}
    return FirstPhase(block, contents["contexts"].get("train"), told)


def _different_data(facts: dict[str, Any], data: TextDataModule) -> list[str]:
    there = facts["data_fingerprint"]
    if there == data.fingerprint:
        return []
    return [f"the training text has fingerprint {there[:12]} there and {data.fingerprint[:12]} here"]


def _different_embedding(weights: dict[str, Tensor], model: ContextLM) -> list[str]:
    there, here = weights["model.embedding.weight"], model.embedding.weight.detach().cpu()
    if there.shape == here.shape and torch.equal(there, here.to(there.dtype)):
        return []
    return ["the token embedding has other values"]
