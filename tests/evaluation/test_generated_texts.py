"""Texts that a run writes: prompts from the command line or a file, and what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_material import material

from newllm.config.compose import compose
from newllm.config.problems import ConfigError
from newllm.config.prompts import read_prompts
from newllm.config.sweeps import examine_jobs
from newllm.evaluation.generation import GenerationConfig, measure
from newllm.evaluation.suite import run_evaluation
from newllm.models.trm import TrmLM


def options(**changes: Any) -> GenerationConfig:
    own: dict[str, Any] = {
        "kind": "generation",
        "prompt": "And",
        "prompts_file": None,
        "output": None,
        "new_tokens": 6,
        "samples": 2,
        "temperature": 1.0,
        "top_k": None,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "seed": 0,
    }
    return GenerationConfig(**(own | changes))


def test_texts_begin_with_the_prompt_and_tell_their_repetition() -> None:
    found = measure(material(), options())

    assert len(found) == 2
    assert found[0]["text"] != found[1]["text"]
    assert all(text["text"].startswith("And") for text in found)
    assert found[0].keys() >= {"repeated_4grams", "distinct_1", "distinct_2"}


def test_prompts_of_a_file_become_lines_of_json(tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "texts.jsonl"
    prompts.write_text("In the beginning\r\n\u59cb\u3081\u306b\n", encoding="utf-8")

    found = measure(material(), options(prompts_file=str(prompts), output=str(output)))

    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert lines == found
    assert [line["prompt"] for line in lines] == ["In the beginning"] * 2 + ["\u59cb\u3081\u306b"] * 2
    assert [line["seed"] for line in lines] == [0, 1, 0, 1]
    assert lines[0] == measure(material(), options(prompt="In the beginning"))[0]


def test_file_that_is_not_utf8_is_refused_with_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("tr\u00e9s\n".encode() + b"tr\xe9s\n")

    with pytest.raises(ValueError, match=r"prompts\.txt: is not UTF-8 at byte 8 \(0xe9\)\. Allowed: UTF-8"):
        read_prompts(str(path))


@pytest.mark.parametrize(("content", "line"), [(b"", 1), (b"one\n\nthree\n", 2), (b"one\n \n", 2)])
def test_empty_lines_are_refused(tmp_path: Path, content: bytes, line: int) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)

    with pytest.raises(ValueError, match=rf"prompts\.txt: line {line} is empty"):
        read_prompts(str(tmp_path / "prompts.txt"))


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prompts_file=.*none: cannot be read \(No such file or directory\)"):
        read_prompts(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"output=.*texts: cannot be written \(No such file or directory\)"):
        measure(material(), options(output=str(tmp_path / "none" / "texts")))


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"evaluation\.generation\.prompt: is empty"):
        measure(material(), options(prompt=""))


def test_prompt_longer_than_the_model_can_take_is_refused() -> None:
    sizes = {"num_layers": 1, "num_heads": 2, "mlp_dim": 12, "latent_steps": 1, "deep_steps": 1, "supervision_steps": 1}
    model, longest = TrmLM(257, 8, max_positions=16, **sizes).eval(), 11

    assert measure(material(model), options(prompt="a" * longest, samples=1))
    with pytest.raises(
        ValueError,
        match=rf"its {longest + 1} tokens and evaluation\.generation\.new_tokens=6 need {longest + 6} positions, "
        rf"the model has {longest + 5}\. Allowed: prompts of up to {longest} tokens",
    ):
        measure(material(model), options(prompt="a" * (longest + 1)))


def test_line_that_is_too_long_is_named(tmp_path: Path) -> None:
    sizes = {"num_layers": 1, "num_heads": 2, "mlp_dim": 12, "latent_steps": 1, "deep_steps": 1, "supervision_steps": 1}
    model, output = TrmLM(257, 8, max_positions=16, **sizes).eval(), tmp_path / "texts.jsonl"
    (tmp_path / "prompts.txt").write_text("short\nmuch too long\n")

    with pytest.raises(ValueError, match=r"prompts_file=.*prompts\.txt: line 2: its 13 tokens"):
        measure(material(model), options(prompts_file=str(tmp_path / "prompts.txt"), output=str(output)))
    assert not output.exists()


def test_sampling_at_temperature_0_is_refused() -> None:
    text = compose([])

    assert "temperature=0: draws nothing" in options(temperature=0).check(text)[0]
    assert options(temperature=0, samples=1).check(text) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["evaluation.generation.prompt="], r"generation\.prompt: is empty"),
        (["evaluation.generation.prompts_file=none.txt"], r"none\.txt: cannot be read \(No such file"),
        (["evaluation.generation.prompts_file=latin1.txt"], r"latin1\.txt: is not UTF-8 at byte 2 \(0xe9\)"),
        (["evaluation.generation.output=none/texts"], r"output=none/texts: stands in no folder"),
        (["evaluation.generation.temperature=0"], r"temperature=0: draws nothing"),
        (["data=delay_copy"], r"evaluation=\[generation\]: writes text, data=delay_copy gives token ids"),
    ],
)
def test_what_cannot_be_continued_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin1.txt").write_bytes("tr\u00e9s".encode("latin-1"))

    with pytest.raises(ConfigError, match=message):
        compose(["evaluation=[generation]", *given])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["prompt="], "evaluation.generation.prompt: is empty"),
        (["evaluation.generation.prompts_file=latin1.txt"], "latin1.txt: is not UTF-8 at byte 2 (0xe9)"),
    ],
)
def test_refusals_of_the_command_line_exit_with_2(tmp_path: Path, monkeypatch, capsys, given, told) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("newllm.evaluation.suite.load_run", lambda *_: SimpleNamespace(config=compose([])))
    Path("latin1.txt").write_bytes("tr\u00e9s".encode("latin-1"))

    with pytest.raises(SystemExit) as stopped:
        run_evaluation(compose(["run=x", "runtime.num_threads=1", "evaluation=[generation]", *given], root="evaluate"))

    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("top_p", ["0", "1.5", "-1"])
def test_top_p_out_of_range_is_refused(top_p: str) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.generation\.top_p=.*Allowed: .*above 0, at most 1"):
        compose(["run=x", "evaluation=[generation]", f"evaluation.generation.top_p={top_p}"], root="evaluate")


@pytest.mark.parametrize(
    "prompt",
    ["\u543e\u8f29\u306f\u732b\u3067\u3042\u308b", "Hear, O Israel: it's", "1984", "[1] In", "a=b", "x\\'s", "'tis"],
)
def test_prompt_is_read_letter_by_letter(prompt: str) -> None:
    assert compose(["run=x", f"prompt={prompt}"], root="evaluate").prompt == prompt


@pytest.mark.parametrize("given", ["'Hear, O Israel'", '"Hear, O Israel"'])
def test_prompt_in_quotes_is_read_without_them(given: str) -> None:
    assert compose(["run=x", f"prompt={given}"], root="evaluate").prompt == "Hear, O Israel"


def test_names_may_have_letters_beyond_ascii() -> None:
    config = compose(["name=\u5b9f\u9a13", "data=jsonl", "data.path=\u732b.jsonl.gz"])

    assert (config.name, config.data.path) == ("\u5b9f\u9a13", "\u732b.jsonl.gz")
    assert len(examine_jobs(["name=\u732b,\u72ac"], "train")) == 1  # two values, not one with a comma


def test_prompt_of_the_command_line_needs_generation(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("newllm.evaluation.suite.load_run", lambda *_: _Run)
    for given, told in (
        (["evaluation=[positions]"], "prompt=Hear: is continued by none of the measurements"),
        (["evaluation=[generation]", "evaluation.generation.prompts_file=x"], "prompt=Hear: stands beside"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_evaluation(compose(["run=x", "prompt=Hear", "runtime.num_threads=1", *given], root="evaluate"))
        assert stopped.value.code == 2
        assert told in capsys.readouterr().err


class _Run:
    """A run that is refused before anything of it is asked for."""
