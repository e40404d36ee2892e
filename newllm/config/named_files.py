"""The files that a configuration names: what is not there is told before anything is built."""

from functools import cache
from pathlib import Path

from newllm.config.schema import TrainConfig
from newllm.data.text_files import find_files


def missing_files(config: TrainConfig) -> list[str]:
    """Return a sentence for each file that the configuration names and that cannot be used."""
    return [*_texts(getattr(config.data, "path", None)), *_tokenizer(config)]


@cache  # a sweep has many jobs over one folder
def _texts(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        find_files(path)
    except ValueError as error:
        return [str(error)]
    return []


def _tokenizer(config: TrainConfig) -> list[str]:
    path = config.tokenizer.path
    if path is None or config.resume is not None or Path(path).is_file():  # a run goes on with its own
        return []
    return [f"tokenizer.path={path}: does not exist. Allowed: a tokenizer.json. Check the path."]
