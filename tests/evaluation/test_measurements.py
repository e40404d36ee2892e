"""Each measurement against a reference or a value by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_material import BLOCK, batches, material
from small_sessions import SEGMENT, model

from newllm.evaluation import lag, perplexity, positions, sliding_window
from newllm.evaluation.scoring import score_batch
from newllm.evaluation.sliding_window import windows
from newllm.recurrence import relative_change


def scored(where):
    total = [score_batch(where.model, batch, where.data.token_bytes) for batch in where.batches()]
    return total[0] + total[1]


def test_perplexity_is_that_of_all_targets_together():
    where = material()

    found = perplexity.measure(where, perplexity.PerplexityConfig(kind="perplexity", compare_compressors=True))

    expected = scored(where)
    assert found["loss"] == expected.metrics()["loss"]
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert (found["targets"], found["bytes"]) == (3 * BLOCK, expected.bytes)
    assert {"xz_bits_per_byte", "zstd_bits_per_byte", "unigram_bits_per_byte"} <= found.keys()


def test_text_that_the_tokenizer_changes_has_no_bits_per_byte_and_says_why():
    where = material()
    where.data.token_bytes.zero_()
    where.data.facts["why_no_bits_per_byte"] = "the tokenizer changes it"

    found = perplexity.measure(where, perplexity.PerplexityConfig(kind="perplexity", compare_compressors=True))

    assert [name for name in found if "bits_per_byte" in name] == ["why_no_bits_per_byte"]
    assert (found["loss"], found["bytes"]) == (scored(where).metrics()["loss"], None)


@pytest.mark.parametrize(
    ("value", "told"), [(3, "leak"), (20, "over-fitting"), (70, "little text"), (300, "from scratch"), (2000, "under")]
)
def test_band_says_what_a_perplexity_usually_means(monkeypatch, value, told):
    where = material(text=batches(sizes=(1,)))
    score = perplexity.Score(nats=math.log(value), tokens=1, correct=0, bytes=4)
    monkeypatch.setattr(perplexity, "score_batch", lambda *_: score)

    found = perplexity.measure(where, perplexity.PerplexityConfig(kind="perplexity", compare_compressors=False))

    assert told in found["band"]


@pytest.mark.parametrize(("tokenizer", "data"), [("bytes", "jsonl"), ("bpe", "stdlib")])
def test_bytes_and_code_have_no_band(tokenizer, data):
    where = material()
    where.run.config.tokenizer.kind, where.run.config.data.kind = tokenizer, data

    found = perplexity.measure(where, perplexity.PerplexityConfig(kind="perplexity", compare_compressors=False))

    assert "band" not in found


def test_compressors_see_the_scored_text_of_any_split():
    where = material()
    where.split = "test"

    found = perplexity.measure(where, perplexity.PerplexityConfig(kind="perplexity", compare_compressors=True))

    assert found["xz_bits_per_byte"] > 8  # random bytes, and a header
    assert "unigram_bits_per_byte" not in found  # it is the validation text's


def test_buckets_of_positions_hold_every_target_once():
    where = material()

    found = positions.measure(where, positions.PositionsConfig(kind="positions", edges=[0, 2, 5]))["by_position"]

    assert [bucket["positions"] for bucket in found] == ["0-1", "2-4", "5-7", "8-8"]
    assert [bucket["targets"] for bucket in found] == [6, 9, 9, 3]
    mean = sum(bucket["loss"] * bucket["targets"] for bucket in found) / 27
    assert mean == pytest.approx(scored(where).metrics()["loss"], rel=1e-9)


def test_memory_models_are_measured_by_segment_too():
    options = positions.PositionsConfig(kind="positions", edges=[0])

    found = positions.measure(material(model("pythia infini")), options)

    assert [bucket["positions"] for bucket in found["by_segment"]] == ["0-3", f"{SEGMENT}-7", "8-8"]
    assert "by_segment" not in positions.measure(material(model("pythia")), options)


@pytest.mark.parametrize("edges", [[], [0, 8, 4], [4, 8], [200]])
def test_edges_that_do_not_ascend_are_refused(edges):
    problems = positions.PositionsConfig(kind="positions", edges=edges).check(None)

    assert "is not ascending" in problems[0]


@given(length=st.integers(0, 200), window=st.integers(1, 40), data=st.data())
def test_windows_score_each_token_once_and_the_first_window_all(length, window, data):
    stride = data.draw(st.integers(1, window))
    counts = [0] * length

    spans = list(windows(length, window, stride))

    for start, end, first in spans:
        assert 0 <= start <= first < end <= length
        assert end - start <= window
        for token in range(first, end):
            counts[token] += 1
    assert counts == [1] * length
    assert not spans or spans[0] == (0, min(window, length), 0)
    assert all(end - start == window for start, end, _ in spans[1:])


def test_sliding_window_by_hand():
    where = material(model("pythia infini", feedback="additive"))
    options = sliding_window.SlidingWindowConfig(kind="sliding_window", window=10, stride=4)
    parts = list(where.batches())
    ids = torch.cat([batch["input_ids"].flatten() for batch in parts])
    labels = torch.cat([batch["labels"].flatten() for batch in parts])

    found = sliding_window.measure(where, options)

    nats = []
    with torch.no_grad():
        for target in range(27):
            end = 10 if target < 10 else min(10 + 4 * math.ceil((target - 9) / 4), 27)
            start = max(0, end - 10)
            logits = where.model(ids[start : target + 1].unsqueeze(0)).logits[0, -1]
            nats.append(-logits.log_softmax(-1)[labels[target]].item())
    assert found["loss"] == pytest.approx(sum(nats) / 27, rel=1e-5)
    assert found["targets"] == 27


def test_window_is_the_block_and_the_stride_a_quarter_unless_given():
    found = sliding_window.measure(
        material(), sliding_window.SlidingWindowConfig(kind="sliding_window", window=None, stride=None)
    )

    assert (found["window"], found["stride"]) == (BLOCK, BLOCK // 4)


def test_stride_that_leaves_tokens_out_is_refused():
    options = sliding_window.SlidingWindowConfig(kind="sliding_window", window=None, stride=10)

    with pytest.raises(ValueError, match=r"stride=10: leaves tokens out between windows of 9"):
        sliding_window.measure(material(), options)


def test_lag_is_that_of_sweeps_from_zeros():
    where = material(text=batches(sizes=(2,)))
    found = lag.measure(where, lag.LagConfig(kind="lag", batches=1, max_sweeps=BLOCK, tolerance=1e-4))
    ids = next(where.batches())["input_ids"]
    with torch.no_grad():
        exact = where.model(ids).hidden
        once = where.model(ids, previous_hidden=torch.zeros_like(exact)).hidden

    assert found["relative_error"]["1"] == pytest.approx(relative_change(exact, once), rel=1e-4)
    assert list(found["relative_error"]) == ["1", "2", "4", "8"]
    assert found["relative_error"]["8"] < found["relative_error"]["1"]
    assert 1 < found["sweeps_to_tolerance"] <= BLOCK
    assert found["loss_exact"] == scored_one(where).metrics()["loss"]
    assert {"loss_lagged", "loss_no_feedback", "contraction"} <= found.keys()


@pytest.mark.parametrize(("max_sweeps", "expected"), [(2, None), (BLOCK, BLOCK)])
def test_sweeps_that_have_not_settled_are_not_told_as_their_number(max_sweeps: int, expected: int | None):
    where = material(text=batches(sizes=(2,)))
    found = lag.measure(where, lag.LagConfig(kind="lag", batches=1, max_sweeps=max_sweeps, tolerance=1e-30))

    assert found["sweeps_to_tolerance"] == expected


def scored_one(where):
    return score_batch(where.model, next(where.batches()), where.data.token_bytes)
