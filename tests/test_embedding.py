"""Token embeddings from tables: counts and PPMI by hand, what the decomposition keeps, what is refused."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse
import torch

import newllm
from newllm.config.compose import compose
from newllm.config.schema import EmbeddingConfig
from newllm.data.blocks import Blocks
from newllm.embedding import (
    count_pairs,
    embedding_table,
    freeze_embedding,
    positive_information,
    run_table,
    set_embedding,
    svd_table,
    token_embedding,
)

EOS = 0


def blocks(ids, length):
    stream = np.array(ids)
    return Blocks(stream, block_length=length, num_blocks=(len(stream) - 1) // length, eos_id=EOS)


def data(samples=None, vocab_size=8, tokenizer_json="ours"):
    tokenizer = SimpleNamespace(to_json=lambda: tokenizer_json)
    return SimpleNamespace(prepared=SimpleNamespace(train=samples), vocab_size=vocab_size, tokenizer=tokenizer)


def config(kind, **keys):
    return EmbeddingConfig(**{"kind": kind, "freeze": True, "window": 2, "path": None} | keys)


def test_pairs_are_counted_both_ways_within_the_window_and_the_text():
    samples = blocks([1, 2, 3, EOS, 1, 1, 2], 6)  # one block of 1 2 3 EOS | 1 1

    counts = count_pairs(samples, 4, window=2).toarray()

    expected = np.zeros((4, 4))
    for one, other in [(1, 2), (2, 3), (3, EOS), (1, 3), (2, EOS), (1, 1)]:
        expected[one, other] += 1
        expected[other, one] += 1
    assert counts.tolist() == expected.tolist()


def test_many_blocks_are_counted_as_one_by_one(monkeypatch):
    samples = blocks(np.random.default_rng(0).integers(1, 6, 61), 4)
    whole = count_pairs(samples, 6, window=3).toarray()

    monkeypatch.setattr("newllm.embedding.BLOCKS_AT_ONCE", 2)

    assert count_pairs(samples, 6, window=3).toarray().tolist() == whole.tolist()


def test_positive_information_by_hand():
    counts = scipy.sparse.csr_array(np.array([[0.0, 3.0, 1.0], [3.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))

    values = positive_information(counts).toarray()

    expected = np.zeros((3, 3))  # sums 4, 3, 1 of 8
    expected[0, 1] = expected[1, 0] = math.log(3 * 8 / (4 * 3))
    expected[0, 2] = expected[2, 0] = math.log(1 * 8 / (4 * 1))
    np.testing.assert_allclose(values, expected, rtol=1e-12)


def test_tokens_in_the_same_company_lie_close_and_absent_ones_are_zero():
    generator = np.random.default_rng(1)
    ids = []
    for _ in range(300):  # 1 or 2 between 3 and 4; 5 or 6 between 7 and 8
        ids += (
            [3, generator.integers(1, 3), 4, EOS] if generator.random() < 0.5 else [7, generator.integers(5, 7), 8, EOS]
        )

    table = svd_table(blocks(ids, 40), 10, 4, window=2)

    near = torch.nn.functional.normalize(table, dim=1) @ torch.nn.functional.normalize(table, dim=1).T
    assert min(near[1, 2], near[5, 6]) > 0.95
    assert near[1:3, 5:7].abs().max() < 0.5
    assert table[9].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(table[:9].square().mean(1).sqrt(), torch.full((9,), 0.02))


def test_the_same_text_gives_the_same_table():
    samples = blocks(np.random.default_rng(0).integers(1, 30, 2000), 20)

    assert torch.equal(svd_table(samples, 30, 8, window=2), svd_table(samples, 30, 8, window=2))


def test_a_table_wider_than_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"embedding=svd: 8 tokens give at most 7 dims, model\.dim=8\. Allowed"):
        embedding_table(config("svd"), data(blocks([1] * 9, 4)), 8)


def test_an_unreachable_table_names_what_can_be_had():
    with pytest.raises(ValueError, match=r"embedding=gpt2.*embedding=random.*embedding=run.*embedding=svd"):
        embedding_table(config("gpt2"), data(), 768)


def test_a_table_of_other_numbers_is_refused(monkeypatch):
    monkeypatch.setattr("newllm.embedding.gpt2_table", lambda: torch.zeros(9, 6))

    with pytest.raises(ValueError, match="a table of 9 tokens and 6 dims, the model has 8 and 4"):
        embedding_table(config("gpt2"), data(), 4)


def finished_run(folder, table, tokenizer_json):
    (folder / "checkpoints").mkdir()
    torch.save({"state_dict": {"model.embedding.weight": table}}, folder / "checkpoints" / "best.ckpt")
    (folder / "tokenizer.json").write_text(tokenizer_json)
    return folder


def test_another_run_gives_its_table(tmp_path):
    table = torch.randn(8, 4)
    run = finished_run(tmp_path, table, "ours")

    assert torch.equal(embedding_table(config("run", path=str(run)), data(), 4), table)


def test_a_run_with_another_tokenizer_is_refused(tmp_path):
    run = finished_run(tmp_path, torch.randn(8, 4), "theirs")

    with pytest.raises(ValueError, match=r"its tokens are others than this run's \(tokenizer.json differs\)"):
        run_table(run, data())


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"best\.ckpt: is missing"):
        run_table(tmp_path, data())


def test_a_run_to_take_the_table_from_must_be_named():
    with pytest.raises(ValueError, match=r"embedding\.path=null: embedding=run takes"):
        compose(["embedding=run"])


def test_context_models_start_from_the_text_unless_told_otherwise():
    assert compose(["model=context", "trainer=lct"]).embedding.kind == "svd"
    assert compose(["model=context", "trainer=lct", "embedding=random"]).embedding.kind == "random"
    assert compose(["model=pythia"]).embedding.kind == "random"


def test_a_frozen_embedding_keeps_its_values_and_gets_no_gradient():
    model = newllm.create_model("context", vocab_size=20)
    table = torch.randn(20, 128)
    set_embedding(model, table)
    freeze_embedding(model)

    model(torch.randint(20, (2, 3))).logits.sum().backward()

    assert torch.equal(token_embedding(model).weight, table)
    assert token_embedding(model).weight.grad is None
    assert model.context_block.layers[0].norm.weight.grad is not None
