"""A session reads a million tokens: peak memory against that after ten thousand, and the state against other chunk sizes."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from bench.measure import Found
from newllm.config.schema import TokenizerConfig
from newllm.data.bible import read_books
from newllm.data.tokenizer_kinds import ready_tokenizer
from newllm.environment import peak_memory
from newllm.models.create import create_model
from newllm.session import MemorySession
from newllm.state import tensors_of

SHORT, LONG = 10_000, 1_000_000  # tokens
CHUNKS = (512, 300)  # tokens of a pass: whole segments, and passes that end inside one
# (name shown, layer, keys): every kind of memory. Attention of a fixed window stands below it: so what is written is computed, too.
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    "infini, delta rule": ("infini", {}),
    "multi_memory": ("multi_memory", {}),
    "hierarchical": ("hierarchical", {}),
    "infini, delta_token": ("infini", {"memory_kernel": "delta_token"}),
}


def session(name: str, chunk_tokens: int) -> MemorySession:
    """Return a reader of two layers of 64, with random weights: neither memory nor rounding depends on what they know."""
    layer, keys = READERS[name]
    tokenizer = ready_tokenizer(TokenizerConfig(kind="bytes", vocab_size=None, path=None))
    assert tokenizer is not None, "bytes need no training"
    sizes = {"dim": 64, "num_layers": 2, "num_heads": 2, "mlp_dim": 128, "window": 64, "segment_length": 64}
    found = create_model("infini", stack=["pythia", layer], vocab_size=tokenizer.vocab_size, seed=0, **sizes, **keys)
    return MemorySession(found.eval(), tokenizer, chunk_tokens=chunk_tokens)


def text_of(num_tokens: int) -> str:
    """Return the Bible's first tokens, bytes, as text of one byte a character."""
    text = "\n".join(book.text for book in read_books(Counter()))
    return text.encode("ascii", errors="replace")[:num_tokens].decode("ascii")


def difference(first: MemorySession, second: MemorySession) -> float:
    """Return the largest difference of two states, over the largest entry of its tensor."""
    own, other = tensors_of(first.state), tensors_of(second.state)
    assert own.keys() == other.keys(), "sessions of one model have states of one form"
    parts = [(tensor.double(), other[name].double()) for name, tensor in own.items() if tensor.numel() > 0]
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in parts)


def measure(name: str, text: str, short: int) -> dict[str, float]:
    """Return peaks in bytes after `short` tokens and all of the text, tokens per second, and how far other chunks lead apart."""
    reader = session(name, CHUNKS[0])
    reader.read(text[:short])
    before, started = peak_memory()["host"], time.monotonic()
    reader.read(text[short:])
    seconds, after = time.monotonic() - started, peak_memory()["host"]
    assert reader.tokens_read == len(text), "every byte is a token"
    other = session(name, CHUNKS[1])
    other.read(text)
    return {
        "tokens": len(text),
        "peak_bytes_short": before,
        "peak_bytes": after,
        "peak_ratio": after / before,
        "state_bytes": reader.state.nbytes,
        "state_difference": difference(reader, other),
        "tokens_per_second": (len(text) - short) / seconds,
    }


def run(quick: bool) -> Found:
    """Measure the first reader over the whole length, the others over a tenth of it."""
    short, long = (SHORT // 10, LONG // 100) if quick else (SHORT, LONG)
    text = text_of(long)
    figures: dict[str, Any] = {}
    lines = [
        f"| reader | tokens | peak RSS after {short:,} | after all | ratio | state | state, other chunks | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for place, name in enumerate(READERS):
        # A process of its own: a peak only rises, and would be that of a reader or a bench before.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            given = text if place == 0 or quick else text[: long // 10]
            figures[name] = found = fresh.submit(measure, name, given, short).result()
        lines.append(
            f"| {name} | {found['tokens']:,} | {found['peak_bytes_short'] / 1e6:.1f} MB | {found['peak_bytes'] / 1e6:.1f} MB "
            f"| {found['peak_ratio']:.4f} | {found['state_bytes']:,} B | {found['state_difference']:.1e} "
            f"| {found['tokens_per_second']:,.0f} |"
        )
        print(lines[-1], flush=True)
    note = (
        f"Two layers of 64 with random weights, attention windows of 64, segments of 64, passes of {CHUNKS[0]} tokens; the other chunks "
        f"have {CHUNKS[1]}. Peak RSS, which only rises, is of a process of the reader's own."
    )
    return Found("\n".join([*lines, "", note]), figures)
