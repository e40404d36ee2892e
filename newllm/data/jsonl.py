"""Any local text: .jsonl, .txt or .parquet files, compressed or not."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from newllm.config.schema import DataConfig, TokenizerConfig
from newllm.data.corpus import prepare_text
from newllm.data.document import Source
from newllm.data.prepared import PreparedData
from newllm.data.text_files import content_hash, find_files, read_files

if TYPE_CHECKING:
    from newllm.config.schema import TrainConfig


@dataclass(frozen=True, kw_only=True)
class JsonlConfig(DataConfig):
    """Local files of text."""

    path: str | None  # a file, a folder or a pattern
    text_field: str  # field of a JSON object, or column of a parquet file, that holds the text
    validation: str | None  # documents "first:last" (last excluded), or a file of its own; null chooses by hash

    def check(self, config: "TrainConfig") -> list[str]:
        """A source of local files needs to be told where they are."""
        if self.path is not None:
            return []
        return ["data.path=null: is not given. Allowed: a file, folder or pattern. Set data.path=<path>."]


def prepare(data: JsonlConfig, tokenizer: TokenizerConfig) -> PreparedData:
    """Return local files as blocks of tokens."""
    assert data.path is not None, "the configuration refuses data=jsonl without data.path"
    files, num_left_out = find_files(data.path)
    signature = {
        "kind": "jsonl",
        "text_field": data.text_field,
        "sha256": content_hash(files),
        "left_out": num_left_out,
    }
    read = partial(read_files, files, data.text_field, "jsonl", num_left_out)
    source = Source(f"data.path={data.path}", signature, read)
    return prepare_text(source, data, tokenizer, validation=data.validation, text_field=data.text_field)
