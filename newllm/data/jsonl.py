"""Any local text: .jsonl, .txt or .parquet files, compressed or not."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from newllm.config.corpus_data import CorpusConfig
from newllm.config.schema import TokenizerConfig
from newllm.data.corpus import prepare_text
from newllm.data.document import Source
from newllm.data.file_pieces import file_stream
from newllm.data.prepared import PreparedData
from newllm.data.records import RecordForm, text_form
from newllm.data.split_rule import split_rule
from newllm.data.streamed import prepare_streamed, stream_rule
from newllm.data.text_files import content_hash, find_files, read_files

if TYPE_CHECKING:
    from newllm.config.schema import TrainConfig


@dataclass(frozen=True, kw_only=True)
class JsonlConfig(CorpusConfig):
    """Local files of text."""

    text_field: str  # field of a JSON object, or column of a parquet file, that holds the text

    def check(self, config: "TrainConfig") -> list[str]:
        """A source of local files needs to be told where they are."""
        missing = "data.path=null: is not given. Allowed: a file, folder or pattern. Set data.path=<path>."
        return [*CorpusConfig.check(self, config), *([missing] if self.path is None else [])]


def file_source(path: str, form: RecordForm, *, kind: str) -> Source:
    """Return local files as a source.

    Raises:
        ValueError: nothing is there, or a file cannot be read.
    """
    files, num_left_out = find_files(path)
    signature = {"kind": kind, "form": form.signature, "sha256": content_hash(files), "left_out": num_left_out}
    return Source(f"data.path={path}", signature, partial(read_files, files, form, kind, num_left_out))


def prepare(data: JsonlConfig, tokenizer: TokenizerConfig) -> PreparedData:
    """Return local files as blocks of tokens."""
    assert data.path is not None, "the configuration refuses data=jsonl without data.path"
    form = text_form(data.text_field)
    if data.streaming:
        stream = file_stream(data.path, form, kind="jsonl")
        return prepare_streamed(stream, data, tokenizer, stream_rule(data.validation, data, form=form))
    source = file_source(data.path, form, kind="jsonl")
    return prepare_text(source, data, tokenizer, split_rule(data.validation, data, form=form))
