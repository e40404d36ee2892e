"""The files that a configuration names: what is not there is told before anything is built."""

from functools import cache
from pathlib import Path

from newllm.config.first_phase import UNTRAINED, phase1_problems
from newllm.config.schema import TrainConfig
from newllm.data.split_rule import names_file
from newllm.data.text_files import find_files


def missing_files(config: TrainConfig) -> list[str]:
    """Return a sentence for each file or folder that the configuration names and that cannot be used."""
    problems = [problem for key, path in named_texts(config).items() for problem in _texts(path, key=key)]
    problems += _phase1(config)
    if config.resume is not None:  # a run goes on with its own tokenizer and weights
        return problems
    return [*problems, *_tokenizer(config.tokenizer.path), *_embedding(config)]


def named_texts(config: TrainConfig) -> dict[str, str]:
    """Return the files, folders and patterns of text that the configuration names, by their keys."""
    path, validation = (getattr(config.data, name, None) for name in ("path", "validation"))
    found = {"data.path": path, "data.validation": validation if names_file(validation) else None}
    return {key: text for key, text in found.items() if text is not None}


@cache  # a sweep has many jobs over one folder
def _texts(path: str, *, key: str) -> list[str]:
    try:
        find_files(path, key=key)
    except ValueError as error:
        return [str(error)]
    return []


def _tokenizer(path: str | None) -> list[str]:
    if path is None or Path(path).is_file():
        return []
    return [f"tokenizer.path={path}: does not exist. Allowed: a tokenizer.json. Check the path."]


def _phase1(config: TrainConfig) -> list[str]:
    folder = getattr(config.trainer, "phase1", None)
    return [] if folder in (None, UNTRAINED) else phase1_problems(Path(folder), config)


def _embedding(config: TrainConfig) -> list[str]:
    path = config.embedding.path
    if config.embedding.kind != "run" or path is None or Path(path, "checkpoints", "best.ckpt").is_file():
        return []
    what = "is a folder without checkpoints/best.ckpt" if Path(path).is_dir() else "does not exist"
    return [f"embedding.path={path}: {what}. Allowed: the folder of a run that has been validated. Check the path."]
