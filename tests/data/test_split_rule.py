from pathlib import Path

import pytest
from small_texts import jsonl_config, write_jsonl

from newllm.data.document import Document
from newllm.data.records import text_form
from newllm.data.split_rule import split_rule

TEXT = text_form("text")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl")


def test_auto_is_refused_with_the_reason(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"data.validation=auto: would take validation text out of the training text"):
        split_rule("auto", jsonl_config(corpus), form=TEXT)


def test_a_range_without_documents_is_refused(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"data.validation=5:5: holds no document. Allowed: first below last"):
        split_rule("5:5", jsonl_config(corpus), form=TEXT)


def test_a_missing_validation_file_is_refused(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"data.validation=gone.jsonl: does not exist. Allowed: "):
        split_rule("gone.jsonl", jsonl_config(corpus), form=TEXT)


def test_a_validation_file_gives_its_documents(corpus: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("never trained on")

    split = split_rule(str(held_out), jsonl_config(corpus), form=TEXT).apply(
        [Document("a", "a", "made"), Document("b", "b", "made")]
    )

    assert [document.text for document in split.validation] == ["never trained on"]


def test_signatures_differ_where_splits_may(corpus: Path) -> None:
    data, other = jsonl_config(corpus), jsonl_config(corpus, validation_share=0.3)

    signatures = [
        split_rule(validation, config, form=TEXT).signature
        for validation, config in [(None, data), (None, other), ("0:2", data), ("0:3", data), (str(corpus), data)]
    ]

    assert all(one != two for index, one in enumerate(signatures) for two in signatures[:index])
