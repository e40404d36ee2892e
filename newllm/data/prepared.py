"""What every source gives to the data module: samples of three splits, and the facts about them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from newllm.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from newllm.data.streamed_blocks import TextStream

NO_TARGET = -100
"""The label where nothing is to be predicted: losses leave it out."""

Batch = dict[str, Tensor]
"""input_ids [B, T], labels [B, T] (NO_TARGET: none), sample_id [B] (all int64), starts_text [B, T] (bool).

Where texts are cut from their own beginnings also is_padding [B, T] (bool): what fills a block behind the end of its text.
"""


def count_tokens_read(batch: Batch) -> int:
    """Return how many input tokens of a batch are text; padding is none, a prompt that is no target is some.

    It waits for the device if is_padding lies there: trainers that read such batches leave it on the host.
    """
    is_padding = batch.get("is_padding")
    return batch["input_ids"].numel() - (0 if is_padding is None else int(is_padding.sum()))


class Samples(Protocol):
    """Samples that are fetched a whole batch at a time; the number of a sample is its sample_id."""

    def __len__(self) -> int: ...

    def __getitems__(self, sample_ids: Sequence[int]) -> Batch: ...


@dataclass(frozen=True)
class PreparedData:
    """Samples and facts of one configuration.

    Attributes:
        tokenizer: None where samples are generated as ids.
        vocab_size: ids are below it (V).
        token_bytes: UTF-8 bytes of each token [V], int64; 0 for tokens that are no text, and for all where they do not add up to
            the bytes of the held-out texts: bits per byte are left out then, and facts["why_no_bits_per_byte"] says why.
        train_document_hashes: hash of each text of which a part is trained on.
        fingerprint: hash of the samples; equal fingerprints mean equal batches.
        facts: counts, entropies and the like; plain values that JSON can hold.
        targets_are_next_tokens: False where a label is another token than the one after its input.
        stream: training text that is read on and on, of which `train` is but the beginning; None where `train` is all of it.
        validation_text: gives the UTF-8 bytes of all validation targets; None where there is no text, or tokens do not spell it.
    """

    tokenizer: Tokenizer | None
    vocab_size: int
    token_bytes: np.ndarray
    train: Samples
    validation: Samples
    test: Samples
    train_document_hashes: frozenset[str]
    validation_document_hashes: frozenset[str]
    fingerprint: str
    facts: dict[str, Any]
    targets_are_next_tokens: bool
    validation_text: Callable[[], bytes] | None
    stream: "TextStream | None" = None
