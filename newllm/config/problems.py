"""What is wrong with a configuration, in sentences that name the key, the value, what is allowed and the closest match."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from traceback import extract_tb
from typing import Any

_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Problem:
    """One mistake.

    Attributes:
        key: dotted key it concerns, "" where no key can be told.
        given: what the user wrote, or the key with its value.
        sentence: what is wrong with it, what is allowed, what to do.
    """

    key: str
    given: str
    sentence: str

    @property
    def text(self) -> str:
        return f"{self.given}: {self.sentence}"


class ConfigError(ValueError):
    """A configuration that cannot be run.

    Attributes:
        problems: every mistake found, one message each.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def told(error: BaseException) -> str:
    """Return an error's message; one that is not in our words with the line of ours that it came from: a model's own code, say."""
    if isinstance(error, ConfigError) or "Allowed:" in str(error):
        return str(error)
    frames = [frame for frame in extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(_PACKAGE)]
    if not frames:
        return str(error)
    path = Path(frames[-1].filename).relative_to(_PACKAGE.parent).as_posix()
    return f"{error} ({type(error).__name__}, {path}, line {frames[-1].lineno})"


def shown(value: Any) -> str:
    """Return the value as it is typed on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(shown(element) for element in value)}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}: {shown(element)}" for key, element in value.items()) + "}"
    return "''" if value == "" else str(value)


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate most like a misspelt word.

    A dotted key is looked for beside its neighbours first, then by its last part anywhere, then as a whole.
    """
    keys = sorted(set(candidates))
    parent, _, last = word.rpartition(".")
    beside = {key.rpartition(".")[2]: key for key in keys if parent and key.rpartition(".")[0] == parent}
    found = [beside[name] for name in get_close_matches(last, beside, n=1)]
    found = found or get_close_matches(word, [key for key in keys if key.rpartition(".")[2] == last], n=1, cutoff=0)
    if found or beside:
        return found[0] if found else None
    anywhere = {key.rpartition(".")[2]: key for key in reversed(keys)}
    found = get_close_matches(word, keys, n=1) or [anywhere[n] for n in get_close_matches(last, anywhere, 1, 0.75)]
    return found[0] if found else None


def listed(words: Iterable[str]) -> str:
    """Return the words sorted, as they stand after `Allowed:`."""
    return ", ".join(sorted(words)) or "none"


def with_closest(sentence: str, word: str, candidates: Iterable[str]) -> str:
    """Return the sentence, followed by the closest match where there is one."""
    match = closest(word, candidates)
    return sentence if match is None else f"{sentence} Closest: {match}."
