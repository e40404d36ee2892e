"""The delay probe: emit the token of k positions ago. Only what is carried from position to position can solve it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
import torch

from newllm.config.fields import Count, Range
from newllm.config.schema import DataConfig, TokenizerConfig
from newllm.data.prepared import NO_TARGET, Batch, PreparedData
from newllm.data.recall import split_sizes

if TYPE_CHECKING:
    from newllm.config.schema import TrainConfig


@dataclass(frozen=True, kw_only=True)
class DelayCopyConfig(DataConfig):
    """Rows of random ids; the label of a position is the input `delay` positions before it."""

    needs_tokenizer: ClassVar[bool] = False

    delay: Count  # positions (k); the first k of a row have no label
    vocab_size: Annotated[int, Range(minimum=2, maximum=2**22)]  # ids to draw from
    num_samples: Annotated[int, Range(minimum=2)]  # rows, training, validation and test together
    generator_seed: Annotated[int, Range(minimum=0)]  # of the rows; the run's own seed does not change them

    def check(self, config: "TrainConfig") -> list[str]:
        """A row must be longer than the delay, or it has no label at all."""
        if self.delay < self.block_length:
            return []
        return [
            f"data.delay={self.delay}: leaves no label in rows of data.block_length={self.block_length}. "
            f"Allowed: 1 to {self.block_length - 1}. Lower data.delay or raise data.block_length."
        ]


class DelayRows:
    """Rows of ids whose labels are their own ids, `delay` positions later.

    Args:
        rows: [N, T].
        delay: k.
    """

    def __init__(self, rows: np.ndarray, *, delay: int) -> None:
        self.rows = rows
        self.delay = delay

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, sample_ids: Sequence[int]) -> Batch:
        """Return the batch of these rows; each row is a text of its own."""
        input_ids = torch.from_numpy(self.rows[np.asarray(sample_ids, dtype=np.int64)].astype(np.int64))
        labels = torch.full_like(input_ids, NO_TARGET)
        labels[:, self.delay :] = input_ids[:, : -self.delay]
        starts_text = torch.zeros_like(input_ids, dtype=torch.bool)
        starts_text[:, 0] = True
        return {
            "input_ids": input_ids,
            "labels": labels,
            "sample_id": torch.as_tensor(sample_ids, dtype=torch.int64),
            "starts_text": starts_text,
        }


def draw_rows(data: DelayCopyConfig) -> np.ndarray:
    """Return rows of uniformly drawn ids [N, T], no two alike: no validation row stands in training.

    Raises:
        ValueError: the draw gave a row twice.
    """
    generator = np.random.default_rng(data.generator_seed)
    rows = generator.integers(data.vocab_size, size=(data.num_samples, data.block_length), dtype=np.int32)
    num_different = len(np.unique(rows, axis=0))
    if num_different < data.num_samples:
        raise ValueError(
            f"data.num_samples={data.num_samples}: only {num_different} rows differ when data.vocab_size="
            f"{data.vocab_size} and data.block_length={data.block_length}. Allowed: rows that all differ. "
            "Raise data.block_length or lower data.num_samples."
        )
    return rows


def prepare(data: DelayCopyConfig, tokenizer: TokenizerConfig) -> PreparedData:
    """Return the generated rows; the tokenizer configuration plays no part."""
    rows = draw_rows(data)
    sizes = split_sizes(
        num_samples=data.num_samples, validation_share=data.validation_share, test_share=data.test_share
    )
    limits = {"train": data.max_train_blocks, "validation": data.max_validation_blocks, "test": None}
    ends = np.cumsum(list(sizes.values()))
    parts = {
        split: rows[end - size : end][: limits[split]] for (split, size), end in zip(sizes.items(), ends, strict=True)
    }
    hashes = {
        split: frozenset(hashlib.sha256(row.tobytes()).hexdigest() for row in part) for split, part in parts.items()
    }
    targets = {split: part.shape[0] * (part.shape[1] - data.delay) for split, part in parts.items()}
    facts = {
        "kind": data.kind,
        "source": f"delay_copy, seed {data.generator_seed}",
        "targets_are_next_tokens": False,
        "split_rule": "order of the draw",
        "splits": {
            split: {
                "documents": len(part),
                "blocks": len(part),
                "tokens": part.size,
                "targets": targets[split],
                "bytes": 0,
            }
            for split, part in parts.items()
        },
        "skipped": {},
        "unseen_share": 0.0,
        "unigram_nats_per_token": float(np.log(data.vocab_size)),
        "unigram_bits_per_byte": None,
        "floor_nats_per_token": None,
    }
    return PreparedData(
        tokenizer=None,
        vocab_size=data.vocab_size,
        token_bytes=np.zeros(data.vocab_size, dtype=np.int64),
        train=DelayRows(parts["train"], delay=data.delay),
        validation=DelayRows(parts["validation"], delay=data.delay),
        test=DelayRows(parts["test"], delay=data.delay),
        train_document_hashes=hashes["train"],
        validation_document_hashes=hashes["validation"],
        fingerprint=hashlib.sha256(
            b"".join(part.tobytes() for part in parts.values()) + bytes([data.delay])
        ).hexdigest(),
        facts=facts,
        targets_are_next_tokens=False,
        validation_text=None,
    )
