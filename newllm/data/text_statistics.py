"""What a text is worth to predictors that count: the figures that losses are held against.

V: vocabulary size.
"""

import numpy as np

CHUNK_TOKENS = 1 << 22
FLOOR_TOKENS = 1 << 22  # a part of a text has the lower empirical entropy, so a floor from a part stays a floor


def count_tokens(stream: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return how often each id occurs [V]; the stream is read piece by piece."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(stream), CHUNK_TOKENS):
        counts += np.bincount(stream[start : start + CHUNK_TOKENS], minlength=vocab_size)
    return counts


def cross_entropy(target_counts: np.ndarray, train_counts: np.ndarray) -> float:
    """Return nats per token of the targets under the training unigram distribution, each id counted once more."""
    smoothed = train_counts + 1
    nats = np.log(smoothed.sum()) - np.log(smoothed)  # [V]
    return float((target_counts * nats).sum() / target_counts.sum())


def unseen_share(target_counts: np.ndarray, train_counts: np.ndarray) -> float:
    """Return the share of targets whose id never occurs in training."""
    return float(target_counts[train_counts == 0].sum() / target_counts.sum())


def entropy(counts: np.ndarray) -> float:
    """Return the entropy of a distribution given by counts, in nats."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def bigram_entropy(stream: np.ndarray, vocab_size: int) -> float:
    """Return nats per token of a stream given the token before it, by the stream's own bigram counts.

    No predictor that looks one token back does better on this text, and nothing learns that much of it at once: a
    loss far below it in the first steps has seen the targets.
    """
    part = np.asarray(stream[:FLOOR_TOKENS], dtype=np.int64)
    _, pair_counts = np.unique(part[:-1] * vocab_size + part[1:], return_counts=True)
    return entropy(pair_counts) - entropy(np.bincount(part[:-1], minlength=vocab_size))
