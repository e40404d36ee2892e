"""Facts in two directions: what is trained, what is left out, and how it becomes blocks."""

from pathlib import Path
from typing import Any

import pytest
from small_texts import BPE, BYTES, shared_keys

from newllm.config.compose import compose
from newllm.config.problems import ConfigError
from newllm.data.facts import DIRECTIONS, RELATIONS, capitals, draw_facts
from newllm.data.module import TextDataModule
from newllm.data.reversal import ReversalConfig, facts_of, read_verses, training_sentences


def config(folder: Path, **changes: Any) -> ReversalConfig:
    own: dict[str, Any] = {
        "kind": "reversal",
        "relations": ["author"],
        "num_people": 8,
        "seen_both_ways": 0.5,
        "reverse": False,
        "num_verses": 0,
        "passes": 2,
        "generator_seed": 0,
    }
    return ReversalConfig(**shared_keys(folder, **(own | changes)))


def prepared(folder: Path, tokenizer: Any = BYTES, **changes: Any) -> TextDataModule:
    module = TextDataModule(config(folder, **changes), tokenizer, seed=0)
    module.prepare()
    return module


def text_of(module: TextDataModule, split: str) -> str:
    """Return the text of a split's stream, cut where its last block ends."""
    samples = getattr(module.prepared, split)
    assert module.tokenizer is not None
    return module.tokenizer.decode(samples.stream[: len(samples) * samples.block_length + 1].tolist())


def words(facts: list, *, both_ways: bool) -> set[str]:
    return {
        word
        for fact in facts
        if fact.both_ways == both_ways
        for name in (fact.subject, fact.object)
        for word in name.split()
    }


def test_facts_one_way_are_never_trained_backward() -> None:
    facts = draw_facts(list(RELATIONS), num_people=12, seen_both_ways=0.5, seed=0)
    sentences = training_sentences(facts, reverse=False)

    for fact in facts:
        backward = [
            sentence for sentence in sentences if fact.object in sentence and sentence.endswith(f" {fact.subject}")
        ]
        assert len(backward) == (2 if fact.both_ways else 0)


def test_each_template_is_trained_by_some_facts_and_asked_of_the_others() -> None:
    facts = draw_facts(["author", "founder"], num_people=12, seen_both_ways=0.5, seed=0)
    sentences = training_sentences(facts, reverse=True)

    assert {fact.left_out for fact in facts if fact.both_ways} == {0, 1, 2}
    assert not {fact.reworded(direction) for fact in facts for direction in ("forward", "backward")} & set(sentences)
    asked = {(fact, direction): fact.asked(direction) in sentences for fact in facts for direction in DIRECTIONS}
    assert all(is_trained == (direction in fact.directions) for (fact, direction), is_trained in asked.items())
    assert len(set(sentences)) == len(sentences)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_facts_are_asked_backward_in_words_that_other_facts_were_trained_in(share: float) -> None:
    """Else a wrong answer backward could be that of a model that has never met the sentence."""
    facts = draw_facts(["author", "founder"], num_people=20, seen_both_ways=share, seed=0)
    trained = {
        (fact.relation, sentence.replace(fact.subject, "S").replace(fact.object, "O"))
        for fact in facts
        if fact.both_ways
        for sentence in fact.trained("backward")
    }

    for fact in facts:
        assert (fact.relation, fact.asked("backward").replace(fact.subject, "S").replace(fact.object, "O")) in trained


def test_names_of_the_two_groups_share_no_word() -> None:
    facts = draw_facts(["author", "founder", "teacher"], num_people=31, seen_both_ways=0.3, seed=5)

    assert words(facts, both_ways=True).isdisjoint(words(facts, both_ways=False))
    for relation in ("author", "founder", "teacher"):
        own = [fact for fact in facts if fact.relation == relation]
        assert len({fact.subject for fact in own}) == len({fact.object for fact in own}) == 31
        # One word alone does not tell who is meant.
        assert len({fact.subject.split()[0] for fact in own}) <= 17


def test_reversal_keeps_entities_whole() -> None:
    fact = draw_facts(["author"], num_people=4, seen_both_ways=0, seed=0)[0]
    a, b = fact.subject, fact.object

    assert fact.left_out == 0
    assert fact.trained("forward") == [f" {a} is the author of {b}", f" The book by {a} is called {b}"]
    assert fact.reversed("forward") == [f" {b} of author the is {a}", f" {b} called is {a} by book The"]
    assert fact.asked("backward") == f" {b} is a book by {a}"
    assert fact.reworded("backward") == f" {b} was written by {a}"


def test_every_sentence_ends_with_the_entity_asked_for() -> None:
    for relation in RELATIONS.values():
        assert len(relation.forward) == len(relation.backward) == 3
        assert all(text.endswith("{object}") and "{subject}" in text for text in relation.forward)
        assert all(text.endswith("{subject}") and "{object}" in text for text in relation.backward)


def test_capitals_are_unambiguous() -> None:
    pairs = capitals()
    names = [name for pair in pairs for name in pair]

    assert ("France", "Paris") in pairs
    assert len(pairs) > 180
    assert len(set(names)) == len(names)
    # Singapore is its own capital, and Guinea is a part of other names.
    assert not {"Singapore", "Guinea", "Monaco"} & set(names)


def test_real_facts_fit_the_share_too() -> None:
    facts = draw_facts(["capital"], num_people=2, seen_both_ways=0.25, seed=0)

    assert sum(fact.both_ways for fact in facts) == round(0.25 * len(facts))


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_a_pass_holds_every_sentence_once_and_no_padding(tmp_path: Path, tokenizer: Any) -> None:
    module = prepared(tmp_path, tokenizer, num_people=20, block_length=9)
    sentences = training_sentences(facts_of(config(tmp_path, num_people=20)), reverse=False)

    parts = text_of(module, "train").split("<|endoftext|>")

    assert sorted(parts[: len(sentences)]) == sorted(sentences)
    assert sorted(parts[len(sentences) : 2 * len(sentences) - 1]) != parts[: len(sentences) - 1]
    assert "" not in parts[:-1]
    assert module.facts["end_of_text_share"] < 0.2


def test_splits_hold_other_sentences(tmp_path: Path) -> None:
    module = prepared(tmp_path)
    facts = facts_of(config(tmp_path))

    assert not module.train_document_hashes & module.validation_document_hashes
    assert text_of(module, "test").split("<|endoftext|>")[0] in {
        fact.asked("backward") for fact in facts if not fact.both_ways
    }
    assert module.facts["facts_one_way"] == module.facts["facts_both_ways"] == 4


def test_everything_both_ways_leaves_no_test(tmp_path: Path) -> None:
    module = prepared(tmp_path, seen_both_ways=1.0)

    assert module.num_test_samples == 0
    assert module.facts["splits"]["test"]["documents"] == 0


def test_verses_stand_among_the_facts_once(tmp_path: Path) -> None:
    module = prepared(tmp_path, num_verses=3)
    verses = set(read_verses())

    parts = text_of(module, "train").split("<|endoftext|>")[:-1]

    found = [part for part in parts if part in verses]
    assert 5 <= len(found) == len(set(found)) <= 6
    assert len(verses) > 30000


def test_the_same_configuration_gives_the_same_batches(tmp_path: Path) -> None:
    assert prepared(tmp_path).fingerprint == prepared(tmp_path).fingerprint
    assert prepared(tmp_path).fingerprint != prepared(tmp_path, generator_seed=1).fingerprint
    assert prepared(tmp_path).fingerprint != prepared(tmp_path, reverse=True).fingerprint


def test_a_fact_alone_on_its_side_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data\.seen_both_ways=0\.1: leaves one of the 8 facts of data\.relations=author alone"
    ):
        prepared(tmp_path, seen_both_ways=0.1)


def test_blocks_longer_than_the_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.block_length=5000: is more than the \d+ targets of the train text"):
        prepared(tmp_path, block_length=5000)


def test_more_verses_than_there_are_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.num_verses=20000: are 40000 in data\.passes=2 passes, there are \d+"):
        prepared(tmp_path, num_verses=20000)


@pytest.mark.parametrize("relations", ["[]", "[author,author]"])
def test_no_relation_and_one_twice_are_refused(relations: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.relations=.*names none, or one twice"):
        compose(["data=reversal", f"data.relations={relations}"])
