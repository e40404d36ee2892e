import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import alter, configure, failed, first_batch, make_model, preflight, prepare, verdicts_on, write_texts

from newllm.data.blocks import Blocks
from newllm.data.module import TextDataModule
from newllm.guards.data_checks import check_splits, check_targets, check_unseen
from newllm.guards.verdict import GuardFailure, require_passed


def _moved(monkeypatch: pytest.MonkeyPatch, shift: int) -> None:
    """Make the one place where targets are shifted shift by something else."""
    cut = Blocks.__getitems__

    def wrong(self, sample_ids):
        batch = cut(self, sample_ids)
        return {**batch, "labels": batch["input_ids"].roll(-shift, dims=1)}

    monkeypatch.setattr(Blocks, "__getitems__", wrong)


def test_unshifted_targets_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _moved(monkeypatch, 0)

    verdicts = preflight(tmp_path)

    assert failed(verdicts) == ["targets"]
    with pytest.raises(GuardFailure, match=r"guards\.targets: .* are the inputs moved by 0\. Allowed: .* by 1\."):
        require_passed(list(verdicts.values()))


def test_targets_shifted_twice_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepare(configure(tmp_path))
    batch = first_batch(data)
    batch["labels"] = torch.cat([batch["labels"][:, 1:], batch["labels"][:, :1]], dim=1)

    verdict = check_targets(batch, data, None)

    assert verdict.status == "failed"
    assert "moved by 2" in verdict.message


def test_a_single_wrong_target_is_caught(tmp_path: Path) -> None:
    data = prepare(configure(tmp_path))
    batch = first_batch(data)
    batch["labels"][1, 3] += 1

    verdict = check_targets(batch, data, None)

    assert verdict.status == "failed"
    assert "differ from the next input at 1 positions" in verdict.message


def test_a_batch_without_targets_is_caught(tmp_path: Path) -> None:
    data = prepare(configure(tmp_path))
    batch = first_batch(data)
    batch["labels"].fill_(-100)

    assert check_targets(batch, data, None).status == "failed"


def test_targets_that_are_no_next_tokens_are_not_judged(tmp_path: Path) -> None:
    config = configure(tmp_path, "data=delay_copy", "data.vocab_size=7", "data.num_samples=40", "data.delay=2")
    data = prepare(config)

    verdicts = verdicts_on(make_model(config, data), data, config)

    assert failed(verdicts) == []
    assert verdicts["targets"].status == "not applicable"


def test_an_example_is_decoded_at_debug_level(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = prepare(configure(tmp_path))
    batch = first_batch(data)

    with caplog.at_level(logging.DEBUG, logger="newllm.guards.data_checks"):
        check_targets(batch, data, data.tokenizer)

    assert data.tokenizer is not None
    assert repr(data.tokenizer.decode(batch["labels"][0, :16].tolist())) in caplog.text


def test_a_text_in_both_splits_is_caught(tmp_path: Path) -> None:
    data = prepare(configure(tmp_path))
    trained = sorted(data.train_document_hashes)[0]
    data = alter(data, validation_document_hashes=data.validation_document_hashes | {trained})

    verdict = check_splits(data)

    assert verdict.status == "failed"
    assert verdict.figures["shared_documents"] == 1
    assert trained[:16] in verdict.message


def test_a_validation_file_with_training_texts_is_caught(tmp_path: Path) -> None:
    trained = write_texts(tmp_path / "texts.jsonl").read_text().splitlines()
    (tmp_path / "validation.jsonl").write_text("\n".join(trained[:6]) + "\n")
    config = configure(tmp_path, f"data.validation={tmp_path / 'validation.jsonl'}", "data.test_share=0")
    data = prepare(config)

    verdicts = verdicts_on(make_model(config, data), data, config)

    assert failed(verdicts) == ["splits"]
    with pytest.raises(GuardFailure, match=r"guards\.splits: \d+ of \d+ validation texts are training texts too"):
        require_passed(list(verdicts.values()))


def _with_unseen(tmp_path: Path, max_unseen: float) -> TextDataModule:
    write_texts(tmp_path / "texts.jsonl")
    (tmp_path / "validation.jsonl").write_text('{"text": "' + "QXZ" * 40 + '"}\n')
    config = configure(tmp_path, f"data.validation={tmp_path / 'validation.jsonl'}", "data.test_share=0")
    data = prepare(config)
    data.data_config = replace(data.data_config, max_unseen=max_unseen)
    return data


def test_validation_tokens_never_trained_on_are_caught(tmp_path: Path) -> None:
    verdict = check_unseen(_with_unseen(tmp_path, 0.05))

    assert verdict.status == "failed"
    assert verdict.figures["unseen_share"] > 0.9
    assert "Allowed: at most data.max_unseen=0.05." in verdict.message


def test_the_share_of_unseen_tokens_is_reported(tmp_path: Path) -> None:
    verdict = check_unseen(_with_unseen(tmp_path, 1.0))

    assert verdict.status == "passed"
    assert verdict.figures["unseen_share"] > 0.9
