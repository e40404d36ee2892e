import json
from pathlib import Path

import pytest
import torch
from small_texts import BYTES, delay_config

from newllm.data.delay_copy import draw_rows, prepare
from newllm.data.prepared import NO_TARGET


@pytest.mark.parametrize("delay", [1, 2, 6])
def test_labels_are_the_ids_of_delay_positions_ago(tmp_path: Path, delay: int) -> None:
    data = prepare(delay_config(tmp_path, delay=delay), BYTES)

    batch = data.train.__getitems__([3, 0])

    for inputs, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        assert labels == [NO_TARGET] * delay + inputs[:-delay]
    assert batch["sample_id"].tolist() == [3, 0]
    assert batch["starts_text"].tolist() == [[True] + [False] * 6] * 2
    assert batch["labels"].dtype == torch.int64


def test_rows_are_drawn_from_the_whole_vocabulary(tmp_path: Path) -> None:
    rows = draw_rows(delay_config(tmp_path, num_samples=200))

    assert set(rows.flatten().tolist()) == set(range(5))
    assert rows.tolist() == draw_rows(delay_config(tmp_path, num_samples=200)).tolist()
    assert rows.tolist() != draw_rows(delay_config(tmp_path, num_samples=200, generator_seed=4)).tolist()


def test_splits_share_no_row_and_count_their_targets(tmp_path: Path) -> None:
    data = prepare(delay_config(tmp_path), BYTES)

    assert (len(data.train), len(data.validation), len(data.test)) == (12, 4, 4)
    assert not data.train_document_hashes & data.validation_document_hashes
    assert data.facts["splits"]["validation"]["targets"] == 4 * (7 - 2)
    assert data.vocab_size == 5
    assert json.loads(json.dumps(data.facts)) == data.facts


def test_limits_keep_the_first_rows(tmp_path: Path) -> None:
    whole = prepare(delay_config(tmp_path), BYTES)
    part = prepare(delay_config(tmp_path, max_train_blocks=2), BYTES)

    assert len(part.train) == 2
    assert part.train_document_hashes < whole.train_document_hashes
    assert part.fingerprint != whole.fingerprint


def test_delays_differ_in_their_fingerprint(tmp_path: Path) -> None:
    one, other = (prepare(delay_config(tmp_path, delay=delay), BYTES) for delay in (1, 2))

    assert one.fingerprint != other.fingerprint


def test_rows_that_must_repeat_are_refused(tmp_path: Path) -> None:
    config = delay_config(tmp_path, vocab_size=2, block_length=3, num_samples=20)

    with pytest.raises(ValueError, match=r"data.num_samples=20: only [1-8] rows differ when data.vocab_size=2 and"):
        prepare(config, BYTES)


def test_shares_that_leave_no_training_row_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"leave no row of data.num_samples=20 for training"):
        prepare(delay_config(tmp_path, validation_share=0.6, test_share=0.4), BYTES)


def test_a_delay_as_long_as_the_row_is_refused(tmp_path: Path) -> None:
    config = delay_config(tmp_path, delay=7)

    assert config.check(None) == [  # type: ignore[arg-type]
        "data.delay=7: leaves no label in rows of data.block_length=7. Allowed: 1 to 6. "
        "Lower data.delay or raise data.block_length."
    ]
    assert delay_config(tmp_path, delay=6).check(None) == []  # type: ignore[arg-type]
