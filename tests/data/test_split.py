import pytest
from hypothesis import given
from hypothesis import strategies as st

from newllm.data.document import Document
from newllm.data.split import Split, rank, split_by_hash, split_by_index, split_by_source


def documents(number: int) -> list[Document]:
    return [Document(f"text {index}", f"id {index}", "made") for index in range(number)]


def ids(part: list[Document]) -> set[str]:
    return {document.id for document in part}


@given(number=st.integers(2, 40), validation_share=st.floats(0.01, 0.6), test_share=st.floats(0, 0.39))
def test_splits_are_disjoint_complete_and_never_empty(number: int, validation_share: float, test_share: float) -> None:
    split = split_by_hash(documents(number), validation_share=validation_share, test_share=test_share)

    parts = [ids(split.train), ids(split.validation), ids(split.test)]
    assert set.union(*parts) == ids(documents(number))
    assert sum(len(part) for part in parts) == number
    assert parts[0]
    assert parts[1]


def test_split_does_not_depend_on_the_order_of_the_documents() -> None:
    one = split_by_hash(documents(30), validation_share=0.1, test_share=0.1)
    other = split_by_hash(documents(30)[::-1], validation_share=0.1, test_share=0.1)

    assert one == other


def test_shares_are_shares_of_the_documents() -> None:
    split = split_by_hash(documents(40), validation_share=0.1, test_share=0.05)

    assert (len(split.train), len(split.validation), len(split.test)) == (34, 4, 2)
    assert split.rule == "hash of the document id: 4 validation, 2 test of 40 documents"


def test_a_share_of_two_documents_still_validates() -> None:
    split = split_by_hash(documents(2), validation_share=0.01, test_share=0.01)

    assert (len(split.train), len(split.validation), len(split.test)) == (1, 1, 0)


@pytest.mark.parametrize(("validation_share", "test_share"), [(0.0, 0.1), (0.6, 0.4)])
def test_shares_that_leave_nothing_are_refused(validation_share: float, test_share: float) -> None:
    with pytest.raises(ValueError, match=r"leave no text .* Allowed: validation above 0, both together below 1"):
        split_by_hash(documents(9), validation_share=validation_share, test_share=test_share)


def test_index_range_takes_exactly_these_documents() -> None:
    split = split_by_index(documents(9), first=2, last=4, test_share=0.0)

    assert ids(split.validation) == {"id 2", "id 3"}
    assert ids(split.train) == ids(documents(9)) - {"id 2", "id 3"}


@pytest.mark.parametrize(("first", "last"), [(5, 12), (0, 9)])
def test_more_validation_indices_than_documents_are_refused(first: int, last: int) -> None:
    with pytest.raises(
        ValueError, match=rf"data.validation={first}:{last}: .* source's 9 .* Allowed: a range within 0:9"
    ):
        split_by_index(documents(9), first=first, last=last, test_share=0.0)


def test_validation_of_its_own_leaves_all_other_documents_to_training_and_test() -> None:
    own = [Document("another", "another", "made")]

    split = split_by_source(documents(10), own, name="x.jsonl", test_share=0.1)

    assert split.validation == own
    assert (len(split.train), len(split.test)) == (9, 1)
    assert "validation x.jsonl" in split.rule


def lone_split(text: str, **shares: float) -> Split:
    return split_by_hash([Document(text, "alone", "made")], **shares)


def test_the_only_document_is_cut_where_words_begin() -> None:
    text = " ".join(str(number) for number in range(200))

    split = lone_split(text, validation_share=0.2, test_share=0.1)

    train, validation, test = split.train[0].text, split.validation[0].text, split.test[0].text
    assert train + validation + test == text
    assert train.endswith(" ")
    assert validation.endswith(" ")
    assert 0.15 < len(validation) / len(text) < 0.25
    assert split.rule.startswith("the only document cut at characters")


def test_an_only_document_of_two_characters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"alone: is the only document, and its 2 characters cannot be cut"):
        lone_split("ab", validation_share=0.2, test_share=0.0)


def test_rank_mixes_the_source() -> None:
    assert rank(documents(20)) != documents(20)
    assert ids(rank(documents(20))) == ids(documents(20))


def test_a_validation_text_is_no_test_text_too() -> None:
    source = documents(20)

    for held_out in source:
        split = split_by_source(source, [Document(held_out.text, "its own file", "made")], name="x", test_share=0.2)

        assert held_out not in split.test
        assert held_out in split.train  # where the guard on splits tells of it
        assert (len(split.train), len(split.test)) == (16, 4)
        assert split.train == [document for document in rank(source) if document not in split.test]
