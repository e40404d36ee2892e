"""What every source gives to the data module: samples of three splits, and the facts about them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from newllm.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from newllm.data.streamed_blocks import TextStream

Batch = dict[str, Tensor]
"""input_ids [B, T], labels [B, T] (-100: no target), sample_id [B] (all int64), starts_text [B, T] (bool)."""


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
        token_bytes: UTF-8 bytes of each token [V], int64; 0 for tokens that are no text.
        train_document_hashes: hash of each text of which a part is trained on.
        fingerprint: hash of the samples; equal fingerprints mean equal batches.
        facts: counts, entropies and the like; plain values that JSON can hold.
        targets_are_next_tokens: False where a label is another token than the one after its input.
        stream: training text that is read on and on, of which `train` is but the beginning; None where `train` is all of it.
        validation_text: gives the UTF-8 bytes of all validation targets; None where there is no text.
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
