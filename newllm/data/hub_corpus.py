"""Corpora of the Hugging Face hub, read record by record; a folder with a clone of a repository is read in the same way."""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from newllm.data.document import Document, Source, text_hash
from newllm.data.document_stream import DocumentStream, long_enough
from newllm.data.records import RecordForm
from newllm.hub import ask

ANSWER_SECONDS = 9.0  # for the whole question; the library's own retries take 20 to 50 s
LIST_SECONDS = 4.0  # for the list of a repository's files
OFFLINE_CHOICES = (
    "data.path=<local files of the same form>, data=bible, data=stdlib, data=chat, data=jsonl data.path=<files>"
)


@dataclass(frozen=True)
class HubSplit:
    """A split of a data set of the hub. Ids of its documents are hashes of the texts: equal texts fall into one split.

    Attributes:
        repository: owner/name on the hub, or a folder that holds a clone.
        revision: branch, tag or commit; unused for a folder.
        split: of the data set.
        form: of its records.
        kind: of the data, for messages and for records that name no source of their own.
        min_characters: shorter texts are skipped and counted.
    """

    repository: str
    revision: str
    split: str
    form: RecordForm
    kind: str
    min_characters: int = 0

    @property
    def name(self) -> str:
        return f"{self.repository}/{self.split}"

    @property
    def signature(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("kind", "repository", "revision", "split", "min_characters")}
        return {**plain, "form": self.form.signature}

    def stream(self) -> DocumentStream:
        """Return the split as a stream.

        Raises:
            ValueError: the hub cannot be reached or does not give the data, or there is no such split.
        """
        records = _open(self.repository, self.revision, self.split, self.kind)
        return DocumentStream(self.name, self.signature, records, self._document_of)

    def source(self) -> Source:
        """Return the split as a source; the hub is asked only when it is read, not where a cache holds it."""
        return Source(self.name, self.signature, lambda skipped: self.stream().documents(skipped))

    def _document_of(self, record: dict[str, Any], skipped: Counter[str]) -> Document | None:
        text = self.form.read(record, f"a record of {self.name}")
        document = Document(text, f"{self.name}:{text_hash(text)}", self.form.source_of(record) or self.kind)
        return long_enough(document, self.min_characters, skipped)


def _open(repository: str, revision: str, split: str, kind: str) -> Any:
    is_folder = Path(repository).is_dir()
    if not is_folder:
        reason = _answered(lambda: why_not(repository, revision))
        if reason is not None:
            raise ValueError(_unreachable(repository, kind, reason))
    from datasets import get_dataset_split_names, load_dataset

    which = {} if is_folder else {"revision": revision}
    try:
        splits = get_dataset_split_names(repository, **which)
        if split not in splits:
            raise ValueError(
                f"data={kind}: {repository} has no split {split}. Allowed: {', '.join(sorted(splits))}. "
                "Choose one of these or another data.repository."
            )
        return load_dataset(repository, split=split, streaming=True, **which)
    except ValueError:
        raise
    except Exception as error:  # whatever the library and its transport raise, the user can only choose again
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(_unreachable(repository, kind, f"{type(error).__name__}: {first_line}")) from None


def _unreachable(repository: str, kind: str, reason: str) -> str:
    return (
        f"data={kind}: {repository} is not to be had from the hub ({reason}). "
        f"Allowed without a network: {OFFLINE_CHOICES}. Choose one of these or connect to the hub."
    )


def why_not(repository: str, revision: str) -> str | None:
    """Return why the hub does not give a data set; None if it would. Gated ones list their files and keep them."""
    from huggingface_hub import HfApi, constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        found = HfApi(endpoint=constants.ENDPOINT).dataset_info(repository, revision=revision, timeout=LIST_SECONDS)
    except Exception as error:  # the library and its transport raise many kinds
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    files = [file.rfilename for file in found.siblings or [] if not file.rfilename.startswith((".", "README"))]
    if not files:
        return "it has no files"
    return ask(f"{constants.ENDPOINT}/datasets/{repository}/resolve/{revision}/{files[0]}")


def _answered(question: Callable[[], str | None]) -> str | None:
    """Return the answer, or that there was none in time: looking up a host name cannot be given a time limit."""
    answers: list[str | None] = []
    thread = threading.Thread(target=lambda: answers.append(question()), daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return answers[0] if answers else f"no answer within {ANSWER_SECONDS:.0f} s"
