"""The harness gets from a run what the model's own logits say."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch

from newllm.config.compose import examine
from newllm.config.extras import not_installed
from newllm.data.tokenizer import END_OF_TEXT, Tokenizer
from newllm.evaluation.harness import encode_pair, sampling_options, score_continuations
from newllm.generation import GREEDY
from newllm.load import load_run
from newllm.models.base import LanguageModel
from newllm.models.create import create_model

ROOT = Path(__file__).parents[2]
NO_HARNESS = not_installed("evaluation=[harness]", "lm_eval", "harness", "the other options")
SIZES = {"dim": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 24}
LETTERS = "abde \n"
PAIRS = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9, 10, 11, 12]), ([2] * 9, [3])]


def model(name: str, **keys: object) -> LanguageModel:
    return create_model(name, vocab_size=31, seed=0, **SIZES, **keys).double().eval()


@torch.no_grad()
def by_hand(model: LanguageModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    logits = model(torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1]
    targets = torch.tensor(continuation)
    nats = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return -nats.item(), bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize(
    ("name", "keys"), [("pythia", {}), ("infini", {"segment_length": 4}), ("pythia", {"feedback": "additive"})]
)
def test_scores_of_a_batch_are_those_of_each_text_alone(name: str, keys: dict[str, object]) -> None:
    tested = model(name, **keys)

    scores = score_continuations(tested, PAIRS, block_length=16, padding=0)

    for (nats, is_greedy), (context, continuation) in zip(scores, PAIRS, strict=True):
        expected, greedy = by_hand(tested, context, continuation)
        assert nats == pytest.approx(expected, rel=1e-9)
        assert is_greedy == greedy


def test_a_text_without_tokens_is_certain() -> None:
    assert score_continuations(model("pythia"), [([1], [])], block_length=16, padding=0) == [(0.0, True)]


def test_the_likeliest_continuation_is_found_greedy() -> None:
    tested = model("pythia")
    with torch.no_grad():
        best = int(tested(torch.tensor([[1, 2, 3]])).logits[0, -1].argmax())

    scores = score_continuations(
        tested, [([1, 2, 3], [best]), ([1, 2, 3], [(best + 1) % 31])], block_length=8, padding=0
    )

    assert [is_greedy for _, is_greedy in scores] == [True, False]


def test_a_long_text_reaches_the_memory_and_not_the_attention() -> None:
    """Changing the first tokens of a text of five blocks moves the last score of a memory model alone."""
    texts = [([first] * 4 + [5] * 36, [7]) for first in (1, 2)]

    plain = score_continuations(model("pythia"), texts, block_length=8, padding=0)
    remembering = score_continuations(model("infini", segment_length=4), texts, block_length=8, padding=0)

    # A plain stack passes what it saw on from layer to layer, but not over five blocks of two layers.
    assert plain[0][0] == pytest.approx(plain[1][0], abs=1e-12)
    assert abs(remembering[0][0] - remembering[1][0]) > 1e-6


@pytest.mark.parametrize(
    ("context", "continuation", "ids", "follows"),
    [
        ("be", " a", ["b", "e"], [" ", "a"]),
        ("be ", "a", ["b", "e"], [" ", "a"]),
        ("bead", "b", ["b", "e", "a", "d"], ["b"]),
        ("bea", "d", ["b", "e", "a"], ["d"]),
        ("a", "b", ["a"], ["b"]),  # of "ab", one token, nothing would be left to score
        ("bea", "bad", ["b", "e", "a"], ["b", "a", "d"]),  # of "beabad" it would be "ad"
        (" \n", "ab", [END_OF_TEXT], [" ", "\n", "ab"]),
    ],
)
def test_what_is_scored_is_the_continuation(
    context: str, continuation: str, ids: list[str], follows: list[str]
) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate([*LETTERS, "ab"])}, [("a", "b")]))
    backend.add_special_tokens([END_OF_TEXT])

    found = encode_pair(Tokenizer(backend), context, continuation)

    assert [[backend.id_to_token(token) for token in part] for part in found] == [ids, follows]


def test_answers_are_drawn_greedily_unless_a_task_says_otherwise() -> None:
    assert sampling_options({"until": ["\n"], "temperature": 0.0}) is GREEDY
    drawn = sampling_options({"do_sample": True, "temperature": 0.5, "top_k": 7})
    assert (drawn.temperature, drawn.top_k, drawn.top_p) == (0.5, 7, 1.0)


def test_what_cannot_be_asked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("newllm.evaluation.harness.not_installed", lambda *_: [])

    def refused(*overrides: str) -> str:
        _, (problem,) = examine(["evaluation=[harness]", *overrides], "train")
        return problem

    assert refused().startswith(
        "evaluation.harness.tasks=[]: asks nothing. Allowed: names of tasks, paths of task files."
    )
    assert "none.yaml does not exist. Allowed: a task file." in refused("evaluation.harness.tasks=[none.yaml]")
    assert "asks in words" in refused("evaluation.harness.tasks=[x]", "data=delay_copy")


CHOICE = """
task: capitals
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_choice: "{{{{cities}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
ROLLING = """
task: texts
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""
WRITING = """
task: writing
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: " end"
generation_kwargs:
  until: ["zz"]
  max_gen_toks: 5
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
CAPITALS = [
    {"country": "France", "cities": ["Paris", "Rome", "Oslo"], "answer": 0},
    {"country": "Italy", "cities": ["Paris", "Rome", "Oslo"], "answer": 1},
    {"country": "Norway", "cities": ["Paris", "Rome", "Oslo"], "answer": 2},
    {"country": "Peru", "cities": ["Lima", "Quito", "Oslo"], "answer": 0},
]
TEXTS = [
    "In the beginning was the word. ",
    "A text that is longer than one block of sixteen tokens by a good deal. " * 3,
]


@pytest.mark.slow
@pytest.mark.skipif(bool(NO_HARNESS), reason="the package lm_eval is not installed")
def test_local_tasks_are_answered_as_the_model_does(tmp_path: Path) -> None:
    (tmp_path / "capitals.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in CAPITALS))
    (tmp_path / "texts.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in TEXTS))
    for name, task, data in (
        ("capitals", CHOICE, "capitals"),
        ("texts", ROLLING, "texts"),
        ("writing", WRITING, "texts"),
    ):
        (tmp_path / f"{name}.yaml").write_text(task.format(data=tmp_path / f"{data}.jsonl"))
    trained = command(
        *(
            tmp_path,
            "train.py",
            "model=infini",
            "size.dim=16",
            "size.num_layers=2",
            "size.num_heads=2",
            "size.mlp_dim=32",
        ),
        *(
            "debug=fast",
            "tokenizer=bytes",
            "data.block_length=32",
            "layers.segment_length=8",
            "evaluation=[]",
            "name=tiny",
        ),
    )
    folder = tmp_path / trained.stdout.splitlines()[-1].removeprefix("run: ")

    asked = command(
        *(tmp_path, "evaluate.py", f"run={folder}", "evaluation=[harness]"),
        "evaluation.harness.tasks=[capitals.yaml,texts.yaml,writing.yaml]",
    )

    found = json.loads((folder / "evaluation.json").read_text())["harness"]
    run = load_run(folder)
    eos = run.tokenizer.eos_id
    right = 0
    for line in CAPITALS:
        context = run.tokenizer.encode(f"The capital of {line['country']} is")
        scores = [by_hand(run.model, context, run.tokenizer.encode(f" {city}"))[0] for city in line["cities"]]
        right += scores.index(max(scores)) == line["answer"]
    assert found["capitals"]["acc"] == right / len(CAPITALS)
    assert found["capitals"]["documents"] == len(CAPITALS)
    pairs = [([eos], run.tokenizer.encode(text)) for text in TEXTS]
    scores = score_continuations(run.model, pairs, block_length=32, padding=eos)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    bits = -sum(nats for nats, _ in scores) / math.log(2) / num_bytes
    assert found["texts"]["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert found["writing"]["exact_match"] == 0.0
    assert "harness.capitals.acc" in asked.stdout


def command(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    given = [sys.executable, str(ROOT / script), *arguments]
    result = subprocess.run(given, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result
