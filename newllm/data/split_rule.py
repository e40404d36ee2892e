"""The key `data.validation`, read: how documents are to be split, and what a cache must know of it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from newllm.config.schema import DataConfig
from newllm.data.document import Document, Source, read_source
from newllm.data.records import RecordForm
from newllm.data.split import Split, split_by_hash, split_by_index, split_by_source
from newllm.data.text_files import content_hash, find_files, read_files

INDEX_RANGE = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True)
class SplitRule:
    """A way to split documents.

    Attributes:
        signature: plain values that differ whenever the split may differ.
        apply: makes the split.
    """

    signature: dict[str, Any]
    apply: Callable[[list[Document]], Split]


def names_file(validation: str | None) -> bool:
    """Return whether the key names files of text, neither documents of the source nor nothing."""
    return validation not in (None, "auto") and INDEX_RANGE.fullmatch(str(validation)) is None


def split_rule(validation: str | None, data: DataConfig, *, form: RecordForm) -> SplitRule:
    """Return the rule that the configuration asks for.

    Args:
        validation: null (by hash), "first:last" (documents of the source, last excluded), or a file of its own.
        data: the shares.
        form: of the records of a validation file.
    Raises:
        ValueError: the value is none of these.
    """
    shares: dict[str, Any] = {"validation_share": data.validation_share, "test_share": data.test_share}
    if validation is None:
        return SplitRule({"rule": "hash", **shares}, partial(split_by_hash, **shares))
    if validation == "auto":
        raise ValueError(
            "data.validation=auto: would take validation text out of the training text, and the loss on it would "
            "measure memory. Allowed: null (documents by hash), first:last (documents), or a file. Choose one of these."
        )
    if (indices := INDEX_RANGE.fullmatch(validation)) is not None:
        return _by_index(int(indices[1]), int(indices[2]), data.test_share)
    return _by_file(validation, form, data.test_share)


def _by_index(first: int, last: int, test_share: float) -> SplitRule:
    if first >= last:
        raise ValueError(
            f"data.validation={first}:{last}: holds no document. Allowed: first below last. Try {first}:{first + 1}."
        )
    signature = {"rule": "index", "first": first, "last": last, "test_share": test_share}
    return SplitRule(signature, partial(split_by_index, first=first, last=last, test_share=test_share))


def _by_file(path: str, form: RecordForm, test_share: float) -> SplitRule:
    files, _ = find_files(path, key="data.validation")
    read = partial(read_files, files, form, "validation", 0)
    signature = {"sha256": content_hash(files), "form": form.signature}
    return rule_by_source(Source(f"data.validation={path}", signature, read), test_share)


def rule_by_source(validation: Source, test_share: float) -> SplitRule:
    """Return the rule that validates on all of a source of its own; test comes out of the training source by hash."""

    def apply(documents: list[Document]) -> Split:
        held_out = read_source(validation).documents
        return split_by_source(documents, held_out, name=validation.name, test_share=test_share)

    return SplitRule({"rule": "source", "validation": validation.signature, "test_share": test_share}, apply)
