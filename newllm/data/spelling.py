"""Whether tokens spell the texts they came from: only then do their bytes add up to those of the text, and bits per byte are true."""

import unicodedata
import warnings
from collections.abc import Iterable

import numpy as np

from newllm.data.document import Document
from newllm.data.tokenizer import Tokenizer


def text_of(ids: np.ndarray, tokenizer: Tokenizer) -> bytes:
    """Return the UTF-8 bytes of token ids."""
    texts = tokenizer.token_texts
    return b"".join(texts[token] for token in ids.tolist())


def why_no_bits_per_byte(texts: Iterable[tuple[Document, np.ndarray]], tokenizer: Tokenizer) -> str | None:
    """Return why a byte of these texts has no true number of bits; None where it has.

    Vocabularies that normalise (lower case, other spaces, accents left out or taken apart) write another text than they were given: its
    bytes are not those of the text, and a model of it does not tell the text. Accents that they compose (NFC) leave it the same text,
    whose bytes are then those of the composed form.

    Args:
        texts: each with its ids, without EOS.
        tokenizer: made the ids.
    """
    num_texts, changed = 0, []
    for document, ids in texts:
        num_texts += 1
        spelt = text_of(ids, tokenizer)
        if spelt not in (document.text.encode(), unicodedata.normalize("NFC", document.text).encode()):
            changed.append(f"{document.id}, whose {document.num_bytes} bytes its tokens spell with {len(spelt)}")
    if not changed:
        return None
    return (
        f"the tokenizer changes {len(changed)} of {num_texts} held-out texts, as {changed[0]}. With bits per byte: vocabularies that "
        "keep every byte, as tokenizer=bpe and tokenizer=bytes"
    )


def bytes_that_count(tokenizer: Tokenizer, *, why_not: str | None) -> np.ndarray:
    """Return the bytes of each token [V], int64; all 0, with a warning, where tokens do not spell the text: bits per byte are left out."""
    if why_not is None:
        return tokenizer.token_bytes
    warnings.warn(f"bits per byte are left out: {why_not}.", stacklevel=3)
    return np.zeros(tokenizer.vocab_size, dtype=np.int64)
