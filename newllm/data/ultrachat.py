"""UltraChat: dialogues as messages, from the hub or from local files of the same form."""

from dataclasses import dataclass
from typing import Annotated, Literal

from newllm.config.corpus_data import CorpusConfig
from newllm.config.fields import Range
from newllm.config.schema import TokenizerConfig
from newllm.data.corpus import prepare_text
from newllm.data.document_stream import first_documents
from newllm.data.file_pieces import file_stream
from newllm.data.hub_corpus import HubSplit
from newllm.data.jsonl import file_source
from newllm.data.messages import messages_form
from newllm.data.prepared import PreparedData
from newllm.data.split_rule import rule_by_source, split_rule
from newllm.data.streamed import prepare_streamed, stream_rule, stream_rule_by_source

HELD_OUT = "test_sft"


@dataclass(frozen=True, kw_only=True)
class UltrachatConfig(CorpusConfig):
    """Dialogues of several turns, each a document.

    `validation` may also be test_sft, the split of that name, which null means where the dialogues come from the hub.
    """

    repository: str  # owner/name on the hub, or a folder with a clone; unused with path
    revision: str  # branch, tag or commit of the repository
    split: str  # of the repository that is trained on
    max_documents: Annotated[
        int | None, Range(minimum=1)
    ]  # first dialogues that are kept; null: all; not for streaming
    format: Literal["plain", "chat_template"]
    chat_template: str  # Jinja over messages, each with role and content


def prepare(data: UltrachatConfig, tokenizer: TokenizerConfig) -> PreparedData:
    """Return dialogues as blocks of tokens."""
    form = messages_form(data.format, data.chat_template)
    split = HubSplit(data.repository, data.revision, data.split, form, "ultrachat")
    held_out = None
    if data.validation == HELD_OUT or (data.validation is None and data.path is None):
        _check_held_out(data)
        named = HubSplit(data.repository, data.revision, HELD_OUT, form, "ultrachat").source()
        held_out = first_documents(named, min_characters=0, max_documents=data.max_documents)
    if data.streaming:
        stream = split.stream() if data.path is None else file_stream(data.path, form, kind="ultrachat")
        by_source = held_out and stream_rule_by_source(held_out, data)
        return prepare_streamed(stream, data, tokenizer, by_source or stream_rule(data.validation, data, form=form))
    source = split.source() if data.path is None else file_source(data.path, form, kind="ultrachat")
    source = first_documents(source, min_characters=0, max_documents=data.max_documents)
    rule = held_out and rule_by_source(held_out, data.test_share)
    return prepare_text(source, data, tokenizer, rule or split_rule(data.validation, data, form=form))


def _check_held_out(data: UltrachatConfig) -> None:
    if data.path is not None:
        raise ValueError(
            f"data.validation={HELD_OUT}: is a split of {data.repository}, and data.path={data.path} reads local files. "
            "Allowed with data.path: null (documents by hash), first:last (documents), or a file. "
            f"Set data.validation to one of these, for example to the file of {HELD_OUT}."
        )
    if data.split == HELD_OUT:
        raise ValueError(
            f"data.split={HELD_OUT}: is validated on. Allowed with data.validation={HELD_OUT}: any other split. "
            "Set data.split=train_sft."
        )
