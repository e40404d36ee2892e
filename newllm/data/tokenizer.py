"""Text to token ids and back; and which bytes of text each token stands for."""

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]")
WORD_MARK = "\u2581"  # a space, as SentencePiece writes it


def byte_of_character() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Source: GPT-2's bytes_to_unicode: printable bytes stand for themselves, the others follow from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [*map(chr, printable), *(chr(256 + index) for index in range(len(others)))]
    return dict(zip(characters, printable + others, strict=True))


class Tokenizer:
    """Token ids for text, and back. Text never becomes EOS: that id separates documents.

    Args:
        backend: tokenizer of the `tokenizers` library; its vocabulary holds an end-of-text token.
        vocab_size: ids are below it; above the backend's own number the rest stay unused. None takes the backend's.
    Raises:
        ValueError: the vocabulary has no known end-of-text token, or more ids than vocab_size.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, vocab_size: int | None = None) -> None:
        # Loader processes are forked after threads have tokenised; without a choice the library warns in each of them.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        self.backend = backend
        self.backend.encode_special_tokens = True  # "<|endoftext|>" written in a text is text, not an end
        self.eos_id = _end_of_text_id(backend)
        # The largest id counts, not the number of tokens: published vocabularies have gaps.
        own_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        if vocab_size is not None and vocab_size < own_size:
            raise ValueError(
                f"tokenizer.vocab_size={vocab_size}: is less than the {own_size} ids of the tokenizer. "
                f"Allowed: at least {own_size}, or null. Set tokenizer.vocab_size={own_size}."
            )
        self.vocab_size = own_size if vocab_size is None else vocab_size

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without EOS."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text; several threads share the work."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; EOS is shown by its name, ids that are no token give nothing."""
        return str(self.backend.decode([int(token) for token in ids], skip_special_tokens=False))

    def to_json(self) -> str:
        """Return the content of tokenizer.json."""
        return str(self.backend.to_str(pretty=True))

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @cached_property
    def token_texts(self) -> list[bytes]:
        """UTF-8 bytes of each id; empty for EOS, other special tokens and unused ids.

        Exact for byte-level vocabularies, where the parts of one character may be several tokens.
        """
        description = json.loads(self.backend.to_str())
        added = {token["id"]: token for token in description["added_tokens"]}
        is_byte_level = '"ByteLevel"' in json.dumps(description["decoder"])
        bytes_of = byte_of_character()
        texts = [b""] * self.vocab_size
        for token, index in self.backend.get_vocab(with_added_tokens=True).items():
            if index in added:
                texts[index] = b"" if added[index]["special"] else added[index]["content"].encode()
            elif is_byte_level and all(character in bytes_of for character in token):
                texts[index] = bytes(bytes_of[character] for character in token)
            else:
                texts[index] = _piece_bytes(token)
        return texts

    @property
    def token_bytes(self) -> np.ndarray:
        """Number of UTF-8 bytes of each id [V], int64."""
        return np.array([len(text) for text in self.token_texts], dtype=np.int64)


def load_tokenizer(path: str | Path, *, vocab_size: int | None = None) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json.

    Args:
        path: file in the format of the `tokenizers` library.
        vocab_size: size of the model's table where it is larger than the tokenizer's own vocabulary.
    Raises:
        ValueError: there is no such file, or it is not a tokenizer.
    """
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"tokenizer.path={path}: cannot be read as a tokenizer ({error}). Allowed: a tokenizer.json. Check the path, or save it "
            "again."
        ) from None
    return Tokenizer(backend, vocab_size=vocab_size)


def _end_of_text_id(backend: tokenizers.Tokenizer) -> int:
    for name in END_OF_TEXT_NAMES:
        token_id = backend.token_to_id(name)
        if token_id is not None:
            return int(token_id)
    raise ValueError(
        "tokenizer: has no token that ends a text. "
        f"Allowed: a vocabulary with one of {', '.join(sorted(END_OF_TEXT_NAMES))}. Add it to tokenizer.json."
    )


def _piece_bytes(token: str) -> bytes:
    """Return the bytes of a SentencePiece or WordPiece token."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.removeprefix("##").replace(WORD_MARK, " ").encode()
