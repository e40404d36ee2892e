"""The phase 1 that a phase 2 builds on, as far as its configuration tells: a finished one, of the same model."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from newllm.config.compose import read_config
from newllm.config.problems import ConfigError
from newllm.config.run_folder import FIRST_PHASE
from newllm.config.schema import TrainConfig
from newllm.config.typed import flat, plain

UNTRAINED = "untrained"
"""In the place of a folder: no phase 1, the context block as it is drawn."""
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
ALLOWED = "Allowed: the folder of a finished run of trainer=cvfp_phase1 or cvfp."


def phase1_folder(folder: Path) -> Path:
    """Return the run folder of the phase 1 in a run of trainer=cvfp_phase1, which is that itself, or cvfp."""
    inside = folder / FIRST_PHASE
    return inside if (inside / "run.json").is_file() else folder


def phase1_problems(folder: Path, config: TrainConfig) -> list[str]:
    """Return a sentence where the folder holds no finished phase 1 of the model of a configuration."""
    where, inside = f"trainer.phase1={folder}", phase1_folder(folder)
    if not (inside / "run.json").is_file():
        return [f"{where}: there is no run (no run.json). {ALLOWED} Check the path, or run phase 1 first."]
    try:
        theirs = read_config(inside / "config.yaml")
    except ConfigError as error:
        return [f"{where}: {problem}" for problem in error.problems]
    if theirs.trainer.kind != "cvfp_phase1":
        return [f"{where}: is a run of trainer={theirs.trainer.kind}. {ALLOWED} Name one of these."]
    if not (inside / "DONE").exists():
        return [
            f"{where}: has not finished (no DONE). {ALLOWED} Go on with it first: {shlex.quote(f'resume={inside}')}."
        ]
    there, here = flat(plain(theirs)), flat(plain(config))
    differences = [f"{key} is {there[key]} there and {here[key]} here" for key in DECISIVE if there[key] != here[key]]
    return [of_another(folder, differences)] if differences else []


def of_another(folder: Path, differences: Sequence[str]) -> str:
    """Return the sentence that refuses a phase 1 for its differences."""
    return (
        f"trainer.phase1={folder}: is of another model or text: {'; '.join(differences)}. "
        "Allowed: a phase 1 with the same of these. Set them as there, or run phase 1 for this model."
    )
