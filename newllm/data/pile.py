"""The Pile: texts of many sources, from the hub or from local files of the same form."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from newllm.config.corpus_data import CorpusConfig
from newllm.config.fields import Range
from newllm.config.schema import TokenizerConfig
from newllm.data.corpus import prepare_text
from newllm.data.document_stream import first_documents
from newllm.data.file_pieces import file_stream
from newllm.data.hub_corpus import HubSplit
from newllm.data.jsonl import file_source
from newllm.data.prepared import PreparedData
from newllm.data.records import RecordForm, text_form
from newllm.data.split_rule import split_rule
from newllm.data.streamed import prepare_streamed, stream_rule

SPLIT = "train"


@dataclass(frozen=True, kw_only=True)
class PileConfig(CorpusConfig):
    """The Pile: `text`, and `meta.pile_set_name` for the part of it that a text comes from."""

    repository: str  # owner/name on the hub, or a folder with a clone; unused with path
    revision: str  # branch, tag or commit of the repository
    max_documents: Annotated[
        int | None, Range(minimum=1)
    ]  # first documents that are kept; null: all; not for streaming
    min_characters: Annotated[int, Range(minimum=0)]  # shorter texts are skipped and counted


def part_of(record: Mapping[str, Any]) -> str | None:
    """Return the part of the Pile that a record comes from; None where it does not say."""
    meta = record.get("meta")
    return meta.get("pile_set_name") if isinstance(meta, Mapping) else None


def pile_form() -> RecordForm:
    """Return the form of the Pile's records."""
    return replace(
        text_form("text"),
        advice="Correct the record, or choose data=jsonl data.text_field=<field>.",
        other_fields=("meta",),
        source_of=part_of,
    )


def prepare(data: PileConfig, tokenizer: TokenizerConfig) -> PreparedData:
    """Return the Pile as blocks of tokens."""
    form, least = pile_form(), data.min_characters
    split = HubSplit(data.repository, data.revision, SPLIT, form, "pile", least)
    if data.streaming:
        path = data.path
        stream = split.stream() if path is None else file_stream(path, form, kind="pile", min_characters=least)
        return prepare_streamed(stream, data, tokenizer, stream_rule(data.validation, data, form=form))
    source = split.source() if data.path is None else file_source(data.path, form, kind="pile")
    source = first_documents(source, min_characters=least, max_documents=data.max_documents)
    return prepare_text(source, data, tokenizer, split_rule(data.validation, data, form=form))
