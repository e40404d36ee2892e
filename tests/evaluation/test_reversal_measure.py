"""What a model says to facts in both directions, against models whose answers are known."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_sessions import model, tokenizer

from newllm.config.compose import compose
from newllm.config.problems import ConfigError
from newllm.data.facts import draw_facts
from newllm.data.reversal import facts_of
from newllm.evaluation.answers import answer_scores, sentence_losses
from newllm.evaluation.material import Material
from newllm.evaluation.reversal import Answers, ReversalConfig, measure, paired_p_value, reciprocal_ranks
from newllm.load import load_run
from newllm.run import run_training

OPTIONS = ReversalConfig(kind="reversal", forward_exact_match=0.95, seed=0)


@pytest.mark.parametrize("feedback", ["none", "additive"])
@pytest.mark.parametrize("stack", ["pythia", "infini pythia"])
def test_answers_are_scored_as_whole_texts_are(stack: str, feedback: str) -> None:
    found = model(stack, feedback=feedback)
    prompts, answers = [[5, 9, 3], [7, 7], [2, 8, 1]], [[4], [6, 6, 1], [9, 2], [3, 3]]

    scores, is_likeliest = answer_scores(found, prompts, answers)

    for row, prompt in enumerate(prompts):
        for column, answer in enumerate(answers):
            with torch.no_grad():
                logits = found(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1)[range(len(answer)), answer].sum().item()
            assert scores[row, column].item() == pytest.approx(expected, abs=1e-4)
            assert is_likeliest[row, column].item() == (logits.argmax(-1).tolist() == answer)


def test_sentences_are_read_alone_and_without_their_first_token() -> None:
    found, sentences = model("infini pythia"), [[5, 9, 3, 2], [7, 7], [1, 2, 3, 4]]

    losses = sentence_losses(found, sentences, eos_id=0)

    for sentence, loss in zip(sentences, losses, strict=True):
        with torch.no_grad():
            logits = found(torch.tensor([[0, *sentence]])).logits[0, 1:-1]
        expected = -logits.log_softmax(-1)[range(len(sentence) - 1), sentence[1:]].mean().item()
        assert loss == pytest.approx(expected, abs=1e-5)


def test_figures_by_hand() -> None:
    found = Answers([True, False], [1, 1 / 4], [2.0, 1.0], [4, 4]).figures()

    assert found["exact_match"] == 0.5
    assert found["mean_reciprocal_rank"] == (1 + 1 / 4) / 2
    assert found["chance_exact_match"] == 1 / 4
    assert found["chance_mean_reciprocal_rank"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    # t = 1.5 / (0.7071 / sqrt 2) = 3 with one degree of freedom: p = 1 - 2 atan(3) / pi.
    assert found["p_value"] == pytest.approx(1 - 2 * math.atan(3) / math.pi)
    assert paired_p_value([0.0, 0.0]) == 1.0


@pytest.mark.parametrize(
    ("row", "expected"),
    [([2.0, 3.0, 1.0], 1 / 2), ([2.0, 2.0, 3.0], (1 / 2 + 1 / 3) / 2), ([math.nan] * 3, (1 + 1 / 2 + 1 / 3) / 3)],
)
def test_equally_likely_answers_share_their_places(row: list[float], expected: float) -> None:
    assert reciprocal_ranks(torch.tensor([row] * 3))[0] == pytest.approx(expected)


def knowing(direction: str, facts: list) -> SimpleNamespace:
    """Return the material of a model that continues every sentence of a direction rightly, and other prompts with byte 1."""
    own = tokenizer()
    follows = {}
    for fact in facts:
        ids = [own.eos_id, *own.encode(fact.asked(direction))]
        follows |= {tuple(ids[:end]): ids[end] for end in range(1, len(ids))}

    class Reader(torch.nn.Module):
        vocab_size = own.vocab_size

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def exact(self, input_ids, state=None):
            """Hidden states that name the next token; the state is the text so far."""
            before = [[] for _ in input_ids] if state is None else state.texts
            texts = [[*old, *new] for old, new in zip(before, input_ids.tolist(), strict=True)]
            length = input_ids.shape[1]
            nexts = [
                [follows.get(tuple(text[: len(text) - length + end + 1]), 1) for end in range(length)] for text in texts
            ]
            return SimpleNamespace(hidden=torch.tensor(nexts)[:, :, None].float(), state=Texts(texts))

        def logits(self, hidden):
            return 20 * torch.nn.functional.one_hot(hidden[..., 0].long(), self.vocab_size).float()

    class Texts:
        def __init__(self, texts):
            self.texts = texts

        def select(self, rows):
            return Texts([self.texts[row] for row in rows])

    return SimpleNamespace(model=Reader(), tokenizer=own, data=SimpleNamespace(data_config=None), facts=facts)


@pytest.mark.parametrize(("known", "told"), [("forward", True), ("backward", False)])
def test_the_other_direction_is_told_only_of_who_knows_the_first(monkeypatch, known: str, told: bool) -> None:
    facts = draw_facts(["author", "founder"], num_people=6, seen_both_ways=0, seed=0)
    where = knowing(known, facts)
    monkeypatch.setattr("newllm.evaluation.reversal.facts_of", lambda data: facts)

    found = measure(where, OPTIONS)

    assert found.keys() == {"one_way"}
    one_way = found["one_way"]
    assert one_way["facts"] == 12
    assert one_way["forward"]["exact_match"] == float(told)
    if told:
        assert one_way["forward"]["mean_reciprocal_rank"] == 1
        # It knows each fact in the words asked for, and in no others.
        assert one_way["forward_reworded"]["exact_match"] == 0
        assert one_way["forward"]["margin_nats"] > 10
        backward = one_way["backward"]
        assert backward["exact_match"] == 0
        # Backward it finds all names of one length equally likely, and so must not seem to know some.
        assert backward["mean_reciprocal_rank"] == pytest.approx(backward["chance_mean_reciprocal_rank"])
        assert one_way["gap"] == one_way["backward_perplexity"] - one_way["forward_perplexity"] > 1
    else:
        assert "forward exact match 0.000 is not above 0.95" in one_way["backward"]
        assert one_way["gap"] == one_way["backward_perplexity"] == one_way["backward"]


def test_data_without_facts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"evaluation=\[reversal\]: asks for facts, data of kind bible hold none"):
        compose(["evaluation=[reversal]"])


@pytest.mark.slow
def test_facts_are_learnt_in_the_direction_trained_and_not_in_the_other(tmp_path: Path) -> None:
    given = [
        *(
            "experiment=reversal",
            "data.num_people=20",
            "data.passes=20",
            "size.dim=64",
            "size.num_layers=2",
            "size.mlp_dim=128",
        ),
        *("trainer.max_steps=200", "data.block_length=32", "runtime.num_threads=1", f"output_dir={tmp_path}"),
    ]

    run_training(compose(given), tmp_path / "run", given)

    run = load_run(tmp_path / "run")
    found = measure(Material.of(run, split="validation", batch_size=None), OPTIONS)["one_way"]
    assert found["facts"] == 10 == sum(not fact.both_ways for fact in facts_of(run.config.data))
    assert found["forward"]["exact_match"] >= 0.5
    assert found["forward"]["p_value"] < 0.01
    of_other_facts = replace(run, facts={**run.facts, "data_fingerprint": "0" * 64})
    with pytest.raises(ValueError, match="was trained on other data"):
        measure(Material.of(of_other_facts, split="validation", batch_size=None), OPTIONS)
