"""The files that a configuration names: what is not there is told before anything is built."""

from functools import cache
from pathlib import Path

from newllm.config.schema import TrainConfig
from newllm.data.split_rule import names_file
from newllm.data.text_files import find_files


def missing_files(config: TrainConfig) -> list[str]:
    """Return a sentence for each file or folder that the configuration names and that cannot be used."""
    validation = getattr(config.data, "validation", None)
    problems = [
        *_texts(getattr(config.data, "path", None), key="data.path"),
        *_texts(validation if names_file(validation) else None, key="data.validation"),
    ]
    if config.resume is not None:  # a run goes on with its own tokenizer and weights
        return problems
    return [*problems, *_tokenizer(config.tokenizer.path), *_embedding(config)]


@cache  # a sweep has many jobs over one folder
def _texts(path: str | None, *, key: str) -> list[str]:
    if path is None:
        return []
    try:
        find_files(path, key=key)
    except ValueError as error:
        return [str(error)]
    return []


def _tokenizer(path: str | None) -> list[str]:
    if path is None or Path(path).is_file():
        return []
    return [f"tokenizer.path={path}: does not exist. Allowed: a tokenizer.json. Check the path."]


def _embedding(config: TrainConfig) -> list[str]:
    path = config.embedding.path
    if config.embedding.kind != "run" or path is None or Path(path, "checkpoints", "best.ckpt").is_file():
        return []
    what = "is a folder without checkpoints/best.ckpt" if Path(path).is_dir() else "does not exist"
    return [f"embedding.path={path}: {what}. Allowed: the folder of a run that has been validated. Check the path."]
