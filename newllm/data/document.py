"""A document, and the sources that documents come from."""

import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any


def text_hash(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Document:
    """One text that is read from its beginning.

    Attributes:
        text: the text itself.
        id: name that stays the same between runs, unique within the source; it decides the split.
        source: name of the source.
    """

    text: str
    id: str
    source: str

    @cached_property
    def text_hash(self) -> str:
        """SHA-256 of the text; two documents with equal texts share it."""
        return text_hash(self.text)

    @cached_property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8 bytes."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    Attributes:
        name: shown in records and messages.
        signature: plain values that differ whenever the documents differ, the code that reads them aside.
        read: yields the documents; counts those it skips, by reason, in the counter it is given.
    """

    name: str
    signature: dict[str, Any]
    read: Callable[[Counter[str]], Iterator[Document]]

    @property
    def key(self) -> dict[str, Any]:
        """What names a cache of the documents: other code in the file that reads them may read others."""
        function = self.read
        while isinstance(function, partial):
            function = function.func
        code = Path(inspect.getfile(function)).read_bytes()
        return {"signature": self.signature, "code": hashlib.sha256(code).hexdigest()}


@dataclass(frozen=True)
class Reading:
    """All documents of a source, and how many were skipped for which reason."""

    documents: list[Document]
    skipped: dict[str, int] = field(default_factory=dict)


def read_source(source: Source) -> Reading:
    """Return the documents of a source, without empty ones and without repetitions of a text.

    A text that came twice could stand in training and in validation at once.

    Raises:
        ValueError: no document is left.
    """
    skipped: Counter[str] = Counter()
    by_hash: dict[str, Document] = {}
    for document in source.read(skipped):
        if not document.text.strip():
            skipped["empty"] += 1
        elif _hash(document) in by_hash:
            skipped["duplicate"] += 1
        else:
            by_hash[document.text_hash] = document
    if not by_hash:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items())) or "none at all"
        raise ValueError(
            f"{source.name}: holds no document with text (skipped: {reasons}). Allowed: at least one. Check data.path."
        )
    return Reading(list(by_hash.values()), dict(sorted(skipped.items())))


def _hash(document: Document) -> str:
    try:
        return document.text_hash
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{document.id}: holds half of a surrogate pair at character {error.start}. Allowed: Unicode text. "
            "Write the character whole, or leave the text out."
        ) from None
