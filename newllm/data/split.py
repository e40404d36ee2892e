"""Which documents train, which validate, which test: decided before any of them is tokenised."""

import hashlib
from dataclasses import dataclass

from newllm.data.document import Document


@dataclass(frozen=True)
class Split:
    """Documents by purpose, each list in the order of the hashes of their ids.

    Hash order mixes the source: the first documents of training stand for all of them when only a part is used.

    Attributes:
        rule: how the split came about, in words.
    """

    train: list[Document]
    validation: list[Document]
    test: list[Document]
    rule: str


def rank(documents: list[Document]) -> list[Document]:
    """Return the documents in the order of the hashes of their ids, the same on every machine."""
    return sorted(documents, key=lambda document: hashlib.sha256(document.id.encode()).digest())


def split_by_hash(documents: list[Document], *, validation_share: float, test_share: float) -> Split:
    """Return a split by rank: the first documents validate, the next test, the rest train.

    A share above 0 gives at least one document, so that tiny corpora can be validated; a lone document is cut.

    Raises:
        ValueError: no document would be left for validation or for training.
    """
    if validation_share <= 0 or validation_share + test_share >= 1:
        raise ValueError(
            f"data.validation_share={validation_share}, data.test_share={test_share}: leave no text for validation or "
            "for training. Allowed: validation above 0, both together below 1. Try 0.05 each."
        )
    if len(documents) == 1:
        return cut_document(documents[0], validation_share=validation_share, test_share=test_share)
    ranked = rank(documents)
    num_validation = min(max(1, round(validation_share * len(ranked))), len(ranked) - 1)
    num_test = min(max(1, round(test_share * len(ranked))), len(ranked) - num_validation - 1) if test_share > 0 else 0
    num_held_out = num_validation + num_test
    return Split(
        ranked[num_held_out:],
        ranked[:num_validation],
        ranked[num_validation:num_held_out],
        f"hash of the document id: {num_validation} validation, {num_test} test of {len(ranked)} documents",
    )


def split_by_index(documents: list[Document], *, first: int, last: int, test_share: float) -> Split:
    """Return a split whose validation is documents first .. last-1 of the source; test comes out of the rest by rank.

    Raises:
        ValueError: the range reaches past the documents, or leaves none to train on.
    """
    if last > len(documents) or last - first >= len(documents):
        raise ValueError(
            f"data.validation={first}:{last}: asks for more validation documents than the source's {len(documents)} "
            f"allow. Allowed: a range within 0:{len(documents)} that leaves at least one. Choose a smaller range."
        )
    chosen = documents[first:last]
    return _with_test(documents[:first] + documents[last:], chosen, test_share, f"documents {first}:{last}")


def split_by_source(documents: list[Document], validation: list[Document], *, name: str, test_share: float) -> Split:
    """Return a split whose validation comes from a source of its own; test comes out of the training source by rank."""
    return _with_test(documents, validation, test_share, f"validation {name}")


def _with_test(rest: list[Document], validation: list[Document], test_share: float, rule: str) -> Split:
    ranked, seen = rank(rest), {document.text_hash for document in validation}
    num_test = min(max(1, round(test_share * len(ranked))), len(ranked) - 1) if test_share > 0 else 0
    # A validation text stays where the guard finds it: among those to train on. As a test text it would have chosen the weights.
    test = [document for document in ranked if document.text_hash not in seen][:num_test]
    taken = {document.id for document in test}
    others = [document for document in ranked if document.id not in taken]
    return Split(others, rank(validation), test, f"{rule}; {len(test)} test documents by hash")


def cut_document(document: Document, *, validation_share: float, test_share: float) -> Split:
    """Return a split of the only document there is: its beginning trains, its end validates and tests.

    Raises:
        ValueError: the text has too few characters to be cut.
    """
    length = len(document.text)
    cuts = (0, round(length * (1 - validation_share - test_share)), round(length * (1 - test_share)), length)
    starts = [cut if cut in (0, length) else _word_start(document.text, cut) for cut in cuts]
    parts = [
        Document(document.text[start:end], f"{document.id}#{part}", document.source)
        for part, start, end in zip(("train", "validation", "test"), starts, starts[1:], strict=False)
    ]
    train, validation, test = ([part] if part.text.strip() else [] for part in parts)
    if not train or not validation:
        raise ValueError(
            f"{document.id}: is the only document, and its {length} characters cannot be cut into training and "
            "validation text. Allowed: two documents, or one long text. Give more text."
        )
    rule = f"the only document cut at characters {starts[1]} and {starts[2]}"
    return Split(train, validation, test, rule)


def _word_start(text: str, cut: int) -> int:
    """Return the next place after `cut` where a line, or else a word, begins; `cut` itself if none is near."""
    window = text[cut : cut + 1000]
    for mark in ("\n", " "):
        if mark in window:
            return cut + window.index(mark) + 1
    return cut
