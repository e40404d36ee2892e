"""Documents read one after another out of a corpus that is never held as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from newllm.data.document import Document, Source

if TYPE_CHECKING:
    from datasets import IterableDataset


@dataclass(frozen=True)
class DocumentStream:
    """A corpus as a stream of records.

    Attributes:
        name: shown in records and messages.
        signature: plain values that differ whenever the records may differ.
        records: the records, in pieces (shards) that several readers can share.
        document_of: (record, counter of what is skipped by reason) -> its document; None where it is skipped.
    """

    name: str
    signature: dict[str, Any]
    records: IterableDataset
    document_of: Callable[[dict[str, Any], Counter[str]], Document | None]

    def documents(self, skipped: Counter[str]) -> Iterator[Document]:
        """Yield the documents from the beginning; counts those it skips, by reason."""
        # A copy: what has been iterated keeps its position, and `records` stands at the beginning for all who read it.
        for record in read_records(deepcopy(self.records)):
            document = self.document_of(record, skipped)
            if document is not None:
                yield document


def read_records(records: IterableDataset) -> Iterator[dict[str, Any]]:
    """Yield the records one by one; `records.state_dict()` is the position behind the last one.

    Read as batches of one: where a loader process iterates plainly, the library gives it a part of the shards by itself.
    """
    for columns in records.iter(batch_size=1):
        yield {name: values[0] for name, values in columns.items()}


def long_enough(document: Document, min_characters: int, skipped: Counter[str]) -> Document | None:
    """Return the document; None, and counted, where it has no text or too little."""
    if not document.text.strip():
        skipped["empty"] += 1
    elif len(document.text) < min_characters:
        skipped[f"shorter than {min_characters} characters"] += 1
    else:
        return document
    return None


def first_documents(source: Source, *, min_characters: int, max_documents: int | None) -> Source:
    """Return the source with its first documents that are long enough; None: all that are."""

    def read(skipped: Counter[str]) -> Iterator[Document]:
        long = (document for document in source.read(skipped) if long_enough(document, min_characters, skipped))
        return islice(long, max_documents)

    limits = {"min_characters": min_characters, "max_documents": max_documents}
    return Source(source.name, {**source.signature, **limits}, read)
