"""Where the token embedding comes from: co-occurrences of the training text, GPT-2, another run, or random numbers.

D: width of the embedding.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.sparse
import torch
from scipy.sparse.linalg import svds
from torch import Tensor, nn

from newllm.config.schema import EmbeddingConfig
from newllm.data.module import TextDataModule
from newllm.data.prepared import Samples
from newllm.hub import fetch_file
from newllm.load import checkpoint_path, read_checkpoint
from newllm.models.base import LanguageModel

# Of every row, as random embeddings have it: tied scores then start as small as random ones.
ROW_ROOT_MEAN_SQUARE = 0.02
BLOCKS_AT_ONCE = 256
OTHERS = "embedding=random, embedding=run embedding.path=<run folder>, embedding=svd"


def count_pairs(samples: Samples, vocab_size: int, *, window: int) -> scipy.sparse.csr_array:
    """Return how often two tokens stand at most `window` tokens apart in one text [V, V], symmetric.

    Args:
        samples: training blocks; pairs across the border of two blocks are not seen.
        vocab_size: V.
        window: largest distance, tokens.
    """
    counts = scipy.sparse.csr_array((vocab_size, vocab_size), dtype=np.float64)
    for start in range(0, len(samples), BLOCKS_AT_ONCE):
        batch = samples.__getitems__(range(start, min(start + BLOCKS_AT_ONCE, len(samples))))
        ids, text = batch["input_ids"].numpy(), batch["starts_text"].numpy().cumsum(axis=1)
        for distance in range(1, min(window, ids.shape[1] - 1) + 1):
            is_one_text = text[:, distance:] == text[:, :-distance]
            pair = (ids[:, :-distance][is_one_text], ids[:, distance:][is_one_text])
            counts += scipy.sparse.coo_array((np.ones(len(pair[0])), pair), counts.shape).tocsr()
    return (counts + counts.T).tocsr()


def positive_information(counts: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    """Return max(0, ln(p(i, j) / (p(i) p(j)))) of counted pairs [V, V], nats; 0 where none was counted.

    Source: PPMI, as in Levy & Goldberg (2014).
    """
    pairs = counts.tocoo()
    by_token = np.asarray(counts.sum(axis=0))
    expected = by_token[pairs.row] * by_token[pairs.col] / by_token.sum()
    values = np.maximum(np.log(pairs.data / expected), 0)
    return scipy.sparse.coo_array((values, (pairs.row, pairs.col)), counts.shape).tocsr()


def svd_table(samples: Samples, vocab_size: int, dim: int, *, window: int) -> Tensor:
    """Return U sqrt(S) of the truncated singular value decomposition of the PPMI matrix, rows of one length [V, D], fp32.

    The same text gives the same table to the last digit. Rows of tokens that the text does not hold are zero.

    Args:
        samples: training blocks.
        vocab_size: V.
        dim: D, below V.
        window: largest distance of two tokens that count as a pair, tokens.
    Raises:
        ValueError: there are not enough tokens for so wide a table.
    """
    if dim >= vocab_size:
        raise ValueError(
            f"embedding=svd: {vocab_size} tokens give at most {vocab_size - 1} dims, model.dim={dim}. "
            f"Allowed: model.dim below {vocab_size}. Lower it or choose embedding=random."
        )
    information = positive_information(count_pairs(samples, vocab_size, window=window))
    # A given start and sign: the solver's own are random. Its full precision would take five times as long.
    left, values, _ = svds(information, k=dim, v0=np.ones(vocab_size), tol=1e-2)
    left = left * np.sign(left[np.abs(left).argmax(axis=0), np.arange(dim)])
    table = (left * np.sqrt(values))[:, ::-1]  # largest first
    # Directions of rounding size are noise: a token without a pair stays zero.
    table[np.asarray(information.sum(axis=1)) == 0] = 0
    size = np.sqrt(np.square(table).mean(axis=1, keepdims=True))
    return torch.from_numpy((ROW_ROOT_MEAN_SQUARE * table / np.where(size > 0, size, 1)).astype(np.float32))


def gpt2_table() -> Tensor:
    """Return GPT-2's token embedding [50257, 768], fp32.

    Raises:
        ValueError: it is neither on this machine nor to be had.
    """
    from safetensors import safe_open

    path = fetch_file("openai-community/gpt2", "model.safetensors", key="embedding=gpt2", choices=OTHERS)
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("wte.weight").float()


def run_table(folder: Path, data: TextDataModule) -> Tensor:
    """Return the token embedding that another run ended with [V, D], of its best checkpoint.

    Raises:
        ValueError: there is no such run, or its tokens are others than these data's.
    """
    path = checkpoint_path(folder, "best")
    weights = read_checkpoint(path, advice="Train that run again, or name another one.")["state_dict"]
    theirs = (folder / "tokenizer.json").read_text(encoding="utf-8") if (folder / "tokenizer.json").is_file() else None
    ours = None if data.tokenizer is None else data.tokenizer.to_json()
    if theirs != ours:
        raise ValueError(
            f"embedding.path={folder}: its tokens are others than this run's (tokenizer.json differs). Allowed: a run with "
            f"the same tokenizer. Choose tokenizer=file tokenizer.path={folder / 'tokenizer.json'} or another run."
        )
    return weights["model.embedding.weight"].float()


def embedding_table(config: EmbeddingConfig, data: TextDataModule, dim: int) -> Tensor:
    """Return the token embedding that a configuration names [V, D]; random ones come with the model.

    Args:
        config: where it comes from, not "random".
        data: prepared data; "svd" reads its training text.
        dim: D.
    Raises:
        ValueError: it cannot be had, or not for so many tokens or so wide.
    """
    assert config.kind != "random", "random embeddings are drawn with the model"
    if config.kind == "svd":
        return svd_table(data.prepared.train, data.vocab_size, dim, window=config.window)
    if config.kind == "run":
        assert config.path is not None, "the schema asks for a path"
        table = run_table(Path(config.path), data)
    else:
        table = gpt2_table()
    if table.shape != (data.vocab_size, dim):
        raise ValueError(
            f"embedding={config.kind}: is a table of {table.shape[0]} tokens and {table.shape[1]} dims, the model has "
            f"{data.vocab_size} and {dim}. Allowed: equal numbers. Set model.dim={table.shape[1]} and choose the tokenizer "
            "of the table, or embedding=svd."
        )
    return table


def token_embedding(model: LanguageModel) -> nn.Embedding:
    """Return the token embedding of a model."""
    embedding = model.get_submodule("embedding")
    assert isinstance(embedding, nn.Embedding), "every model calls its token embedding `embedding`"
    return embedding


@torch.no_grad()
def set_embedding(model: LanguageModel, table_VD: Tensor) -> None:
    """Give the model's token embedding these values, in place."""
    token_embedding(model).weight.copy_(table_VD)


def freeze_embedding(model: LanguageModel) -> None:
    """Leave the model's token embedding, and scores tied to it, out of training."""
    token_embedding(model).weight.requires_grad_(False)
