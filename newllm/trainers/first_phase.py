"""What a finished phase 1 hands over to phase 2: its context block, and the contexts it came to."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from newllm.config.compose import read_config
from newllm.config.run_folder import FIRST_PHASE
from newllm.config.schema import TrainConfig
from newllm.config.typed import flat, plain
from newllm.data.module import TextDataModule
from newllm.load import checkpoint_path, read_checkpoint
from newllm.models.context import ContextLM
from newllm.run_record import read_run

DECISIVE = (
    "model.context_dim",
    "model.dim",
    "model.ffn_expand",
    "model.ffn_layers",
    "model.num_input_tokens",
    "model.num_layers",
    "trainer.reset_at_document",
)
"""Keys that decide what contexts are; how a token block reads them is phase 2's own choice."""


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
    where = f"trainer.phase1={folder}"
    inside = folder / FIRST_PHASE if (folder / FIRST_PHASE / "run.json").is_file() else folder
    allowed = "Allowed: the folder of a finished run of trainer=cvfp_phase1 or cvfp."
    if not (inside / "run.json").is_file():
        raise ValueError(f"{where}: there is no run (no run.json). {allowed} Check the path, or run phase 1 first.")
    theirs = read_config(inside / "config.yaml")
    if theirs.trainer.kind != "cvfp_phase1":
        raise ValueError(f"{where}: is a run of trainer={theirs.trainer.kind}. {allowed} Name one of these.")
    if not (inside / "DONE").exists():
        raise ValueError(
            f"{where}: has not finished (no DONE). {allowed} Go on with it first: {shlex.quote(f'resume={inside}')}."
        )
    facts = read_run(inside).facts
    contents = read_checkpoint(checkpoint_path(inside, "last"), advice="Make phase 1 again, or name another run of it.")
    differences = [*_different_keys(theirs, config), *_different_data(facts, data)]
    if config.resume is None:  # a resumed run's embedding comes with its checkpoint
        differences += _different_embedding(contents["state_dict"], model)
    if differences:
        raise ValueError(
            f"{where}: is of another model or text: {'; '.join(differences)}. Allowed: a phase 1 with the same of these. "
            "Set them as there, or run phase 1 for this model."
        )
    prefix = "model.context_block."
    block = {
        name.removeprefix(prefix): part for name, part in contents["state_dict"].items() if name.startswith(prefix)
    }
    told = {name: facts.get(name) for name in ("exit_reason", "wall_seconds", "metrics", "contexts")}
    told |= {"folder": str(inside), "iterations": contents["global_step"]}
    return FirstPhase(block, contents["contexts"].get("train"), told)


def _different_keys(theirs: TrainConfig, ours: TrainConfig) -> list[str]:
    there, here = flat(plain(theirs)), flat(plain(ours))
    return [f"{key} is {there[key]} there and {here[key]} here" for key in DECISIVE if there[key] != here[key]]


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
