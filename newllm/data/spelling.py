"""Whether tokens spell the texts they came from: only then do their bytes add up to those of the text, and bits per byte are true."""

import hashlib
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from newllm.data.tokenizer import Tokenizer


class TokenisedText(NamedTuple):
    """A text as tokens.

    Attributes:
        id: name of the text.
        hashes: SHA-256 of its UTF-8 bytes as they stand, and in Unicode's normal form C.
        num_bytes: their number.
        ids: its tokens, without EOS.
    """

    id: str
    hashes: tuple[str, str]
    num_bytes: int
    ids: np.ndarray


def text_of(ids: np.ndarray, tokenizer: Tokenizer) -> bytes:
    """Return the UTF-8 bytes of token ids."""
    texts = tokenizer.token_texts
    return b"".join(texts[token] for token in ids.tolist())


def why_no_bits_per_byte(texts: Iterable[TokenisedText], tokenizer: Tokenizer) -> str | None:
    """Return why a byte of these texts has no true number of bits, and warn of it; None where it has.

    Vocabularies that normalise (lower case, other spaces, accents left out or taken apart) write another text than they were given: its
    bytes are not those of the text, and a model of it does not tell the text. Accents that they compose (NFC) leave it the same text,
    whose bytes are then those of the composed form.
    """
    num_texts, changed = 0, []
    for text in texts:
        num_texts += 1
        spelt = text_of(text.ids, tokenizer)
        if hashlib.sha256(spelt).hexdigest() not in text.hashes:
            changed.append(f"{text.id}, whose {text.num_bytes} bytes its tokens spell with {len(spelt)}")
    if not changed:
        return None
    reason = (
        f"the tokenizer changes {len(changed)} of {num_texts} held-out texts, as {changed[0]}. With bits per byte: vocabularies that "
        "keep every byte, as tokenizer=bpe and tokenizer=bytes"
    )
    warnings.warn(f"bits per byte are left out: {reason}.", stacklevel=3)
    return reason


def bytes_that_count(tokenizer: Tokenizer, *, spells_text: bool) -> np.ndarray:
    """Return the bytes of each token [V], int64; all 0 where tokens do not spell the text, which leaves bits per byte out."""
    return tokenizer.token_bytes if spells_text else np.zeros(tokenizer.vocab_size, dtype=np.int64)
