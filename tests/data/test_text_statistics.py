import math

import numpy as np
import pytest

from newllm.data import text_statistics
from newllm.data.text_statistics import bigram_entropy, count_tokens, cross_entropy, entropy, unseen_share

STREAM = np.array([0, 1, 0, 1, 2, 0, 1, 0], dtype=np.uint16)


def test_counts_do_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_statistics, "CHUNK_TOKENS", 3)

    assert count_tokens(STREAM, 5).tolist() == [4, 3, 1, 0, 0]


def test_cross_entropy_adds_one_to_every_count() -> None:
    train, targets = np.array([5, 1, 0]), np.array([1, 0, 2])

    # probabilities after smoothing: 6/9, 2/9, 1/9
    assert cross_entropy(targets, train) == pytest.approx((math.log(9 / 6) + 2 * math.log(9)) / 3)


def test_unseen_share_counts_targets_not_ids() -> None:
    assert unseen_share(np.array([1, 0, 3]), np.array([5, 1, 0])) == 0.75


def test_entropy_of_equal_shares_is_the_logarithm_of_their_number() -> None:
    assert entropy(np.array([3, 0, 3, 3])) == pytest.approx(math.log(3))


def test_bigram_entropy_of_a_text_that_repeats_is_zero() -> None:
    assert bigram_entropy(np.tile([4, 1, 3], 20), 5) == pytest.approx(0, abs=1e-12)


def test_bigram_entropy_by_hand() -> None:
    # after 0 comes 1, 1, 1; after 1 comes 0, 2, 0; after 2 comes 0: only 1 leaves a choice, of 2 to 1, 3 times of 7
    choice = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))

    assert bigram_entropy(STREAM, 3) == pytest.approx(3 / 7 * choice)


def test_bigram_entropy_of_random_ids_is_at_most_the_unigram_entropy() -> None:
    stream = np.random.default_rng(0).integers(8, size=20_000)

    # 64 pairs seen about 300 times each: the estimate lies below ln 8 by about 64 / (2 * 20000) nats
    assert bigram_entropy(stream, 8) == pytest.approx(math.log(8), abs=0.005)
