"""Peak memory of reading a streamed corpus, for corpora of different sizes: it must not grow with the text.

Every size is read to its end in a process of its own, for peaks are of a process's whole life; `tokenised` as training reads it,
`read` without tokenising, which leaves time for more. `python -m bench.streaming_memory <file> tokenised|read` is that process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from bench.measure import Found, table
from newllm.config.schema import TokenizerConfig
from newllm.data.bible import read_books
from newllm.data.jsonl import JsonlConfig, prepare
from newllm.data.streamed_blocks import StreamedBlocks, TextStream
from newllm.environment import peak_memory

Way = Literal["tokenised", "read"]
SIZES: dict[Way, tuple[int, ...]] = {"tokenised": (10, 300), "read": (10, 10_000)}  # MB; minutes each
QUICK: dict[Way, tuple[int, ...]] = {"tokenised": (2, 4), "read": (2, 20)}
ALLOWED = 0.10  # of the smallest peak
DOCUMENT_CHARACTERS = 4000  # about a web page
ROOT = Path(__file__).parent.parent


def write_corpus(path: Path, megabytes: int) -> None:
    """Write the Bible again and again, a few thousand characters per line, until there is so much."""
    pieces = [
        json.dumps({"text": book.text[at : at + DOCUMENT_CHARACTERS]})
        for book in read_books(Counter())
        for at in range(0, len(book.text), DOCUMENT_CHARACTERS)
    ]
    once, left = ("\n".join(pieces) + "\n").encode(), megabytes * 1_000_000
    with path.open("wb") as file:
        while left >= len(once):
            left -= file.write(once)
        file.write(once[: once.rfind(b"\n", 0, left) + 1])


def configuration(path: Path) -> JsonlConfig:
    """Return what data=jsonl data.streaming=true gives for the corpus."""
    return JsonlConfig(
        kind="jsonl",
        path=str(path),
        text_field="text",
        validation=None,
        streaming=True,
        shuffle_buffer=1_000_000,
        sample_characters=1_000_000,
        block_length=128,
        batch_size=64,
        eval_batch_size=8,
        num_workers=0,
        shuffle=True,
        validation_share=0.05,
        test_share=0.05,
        max_train_blocks=None,
        max_validation_blocks=50,
        max_unseen=1.0,
        cache_dir=str(path.parent / "cache"),
    )


def read_to_the_end(text: TextStream, way: Way) -> dict[str, int]:
    """Read one pass over the corpus and return how much of it was training text."""
    if way == "read":
        return {"documents": sum(text.is_training(document) for document in text.documents.documents(Counter()))}
    reader = iter(StreamedBlocks(text, 64, seed=0, shuffle=True))
    num_blocks = 0
    while (batch := next(reader)) and reader.start["passes"] == 0:
        num_blocks += len(batch["sample_id"])
    return {"blocks": num_blocks}


def measure_here(path: Path, way: Way) -> dict[str, Any]:
    """Read a corpus in this process; return its peak in bytes, and what was read."""
    data = prepare(configuration(path), TokenizerConfig(kind="bpe", vocab_size=1024, path=None))
    assert data.stream is not None, "streaming was asked for"
    started = time.perf_counter()
    found = read_to_the_end(data.stream, way)
    seconds = time.perf_counter() - started
    return {"corpus_bytes": path.stat().st_size, "peak_bytes": peak_memory()["host"], "seconds": seconds, **found}


def measure(megabytes: int, way: Way) -> dict[str, Any]:
    """Return the figures of a corpus of that size, read in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.jsonl"
        write_corpus(path, megabytes)
        command = [sys.executable, "-m", "bench.streaming_memory", str(path), way]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def growth(rows: list[dict[str, Any]]) -> float:
    """Return by which part the largest peak is above the smallest."""
    peaks = [row["peak_bytes"] for row in rows]
    return max(peaks) / min(peaks) - 1


def run(quick: bool) -> Found:
    """Measure both ways at all sizes."""
    lines: list[list[str]] = []
    figures: dict[str, Any] = {"allowed_growth": ALLOWED}
    for way, sizes in (QUICK if quick else SIZES).items():
        rows = [measure(size, way) for size in sizes]
        figures[way] = {"rows": rows, "growth": growth(rows)}
        for row in rows:
            size, peak = row["corpus_bytes"] / 1e6, row["peak_bytes"] / 1e6
            lines.append([way, f"{size:,.0f}", f"{peak:,.0f}", f"{size / row['seconds']:.1f}", f"{growth(rows):.1%}"])
    text = table(["", "corpus, MB", "peak, MB", "MB/s", "largest peak above smallest"], lines)
    return Found(
        f"{text}\n\nAllowed: {ALLOWED:.0%}. The Bible over and over, in one process, without loader processes.", figures
    )


if __name__ == "__main__":
    print(json.dumps(measure_here(Path(sys.argv[1]), "read" if sys.argv[2] == "read" else "tokenised")))
