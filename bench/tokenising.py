"""Tokenising a corpus to ids on disk against the `tokenizers` library's own batch calls on the same cores, in turns."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from bench.measure import Found, paired_ratio, require_quiet, table, take_turns
from newllm.config.schema import TokenizerConfig
from newllm.data.bible import read_books
from newllm.data.document import Document
from newllm.data.streams import write_stream
from newllm.data.tokenizer_kinds import train_tokenizer

DOCUMENT_CHARACTERS = 4000  # about a web page


def corpus() -> list[Document]:
    """Return the Bible in documents of one length."""
    texts = [book.text for book in read_books(Counter())]
    pieces = [text[at : at + DOCUMENT_CHARACTERS] for text in texts for at in range(0, len(text), DOCUMENT_CHARACTERS)]
    return [Document(text, f"made/{number}", "made") for number, text in enumerate(pieces)]


def run(quick: bool) -> Found:
    """Tokenise all of the Bible; a tenth of it, once, where it is only to be shown that it runs."""
    documents = corpus()[:: 10 if quick else 1]
    texts = [document.text for document in documents]
    megabytes = sum(document.num_bytes for document in documents) / 1e6
    tokenizer = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=4096, path=None), texts)
    backend = tokenizer.backend
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.bin"

        def ours() -> None:
            fresh = [Document(text, f"made/{number}", "made") for number, text in enumerate(texts)]  # hashed anew
            write_stream(path, fresh, tokenizer, np.dtype(np.uint16))

        alternatives = {
            "newllm, to ids on disk": ours,
            "tokenizers, encode_batch": lambda: backend.encode_batch(texts, add_special_tokens=False),
            "tokenizers, encode_batch_fast": lambda: backend.encode_batch_fast(texts, add_special_tokens=False),
        }
        rows = take_turns(alternatives, rounds=1 if quick else 7)
    if not quick:
        require_quiet(rows, "tokenising")
    over = {row.name: paired_ratio(row, rows[0]) for row in rows}
    lines = [[row.name, f"{megabytes / row.median:.2f}", f"{over[row.name]:.2f}"] for row in rows]
    text = table(["", "MB/s", "newllm's throughput over it"], lines)
    about = f"{megabytes:.1f} MB in {len(documents)} documents, byte-level BPE of 4096, rounds in turns."
    figures = {
        "megabytes": megabytes,
        "documents": len(documents),
        "newllm_throughput_over": over,
        "rows": {row.name: row.figures() for row in rows},
    }
    return Found(f"{text}\n\n{about}", figures)
