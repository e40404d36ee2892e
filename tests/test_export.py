"""A Pythia stack travels to transformers and back, and stays the same function."""

import inspect
import json
import shlex
import textwrap
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from newllm.config.compose import compose
from newllm.data.tokenizer import END_OF_TEXT
from newllm.export import main, reading_back
from newllm.load import load_run
from newllm.models.create import build_model, load_published
from newllm.run import run_training

TINY = [
    *("size.dim=16", "size.num_layers=2", "size.num_heads=2", "size.mlp_dim=24", "data=jsonl", "data.block_length=16"),
    *("debug=fast", "tokenizer=bpe", "tokenizer.vocab_size=300", "callbacks=quiet", "evaluation=[]", "guards=off"),
    *("logger=none",),
]


def text_file(folder: Path) -> Path:
    """Some text of the standard library, in six documents."""
    file, text = folder / "text.jsonl", inspect.getsource(textwrap)
    file.write_text("".join(f"{json.dumps({'text': text[start : start + 1500]})}\n" for start in range(0, 9000, 1500)))
    return file


def trained(folder: Path, *overrides: str) -> Path:
    text = text_file(folder)
    given = [*TINY, f"data.path={text}", f"data.cache_dir={folder / 'cache'}", *overrides]
    run_training(compose(given), folder / "run", given)
    return folder / "run"


@torch.no_grad()
def test_an_exported_run_is_the_same_function_there_and_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(tmp_path, "layers.rotary_share=0.5")
    file = folder / "tokenizer.json"
    backend = Tokenizer.from_file(str(file))
    # As some published tokenizers do unless told not to; runs never let them.
    backend.post_processor = TemplateProcessing(single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)])
    backend.save(str(file))
    run, target = load_run(folder), tmp_path / "my exports"

    capsys.readouterr()
    assert main([str(folder), str(target)]) == 0
    said = capsys.readouterr()

    assert said.err == ""
    text = "In the beginning was <|endoftext|> the word."
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    encoded = tokenizer(text, return_tensors="pt")
    assert encoded["input_ids"][0].tolist() == run.tokenizer.encode(text)
    assert tokenizer.eos_token_id == run.tokenizer.eos_id == model.config.eos_token_id
    expected = run.model(encoded["input_ids"]).logits
    torch.testing.assert_close(model(**encoded).logits, expected, atol=1e-5, rtol=0)
    config = compose(
        [*reading_back(folder, target), "data=jsonl", f"data.path={text_file(tmp_path)}", f"data.cache_dir={tmp_path}"]
    )
    assert f"read it back: python train.py {shlex.join(reading_back(folder, target))}\n" in said.out
    back = build_model(config, run.model.vocab_size)
    load_published(back, config)
    torch.testing.assert_close(back(encoded["input_ids"]).logits, expected, atol=1e-6, rtol=0)
    assert not list(tmp_path.glob(".*partial"))


def test_what_transformers_cannot_hold_is_refused_before_torch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        assert stopped.value.code == 2
        return capsys.readouterr().err

    folder, target = tmp_path / "run", tmp_path / "my exports"
    assert refused(str(folder)).startswith(
        "newllm: nothing was started, 1 problem found:\n  - the following arguments are"
    )
    assert "argument folder: an empty name names no folder" in refused(str(folder), "")
    assert f"{folder / 'run.json'}: is missing." in refused(str(folder), str(target))
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    (folder / "config.yaml").write_text("{}")
    assert "config.yaml: is empty or no run's configuration." in refused(str(folder), str(target))
    (folder / "config.yaml").write_text("{model: {kind: transformer}, layers: {stack: [infini, pythia]}}")
    assert "has layers infini, GPT-NeoX has not. Allowed: model=pythia" in refused(str(folder), str(target))
    (folder / "config.yaml").write_text("{model: {kind: trm}, layers: {stack: []}}")
    assert "has a model of kind trm, GPT-NeoX has not." in refused(str(folder), str(target))
    (folder / "config.yaml").write_text("{model: {kind: transformer}, layers: {stack: [pythia]}}")
    assert f"{tmp_path}: exists. Allowed: a folder that does not exist yet." in refused(str(folder), str(tmp_path))


def test_a_model_with_feedback_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained(tmp_path, "trainer=lct")

    with pytest.raises(SystemExit) as stopped:
        main([str(folder), str(tmp_path / "my exports")])

    assert stopped.value.code == 2
    assert "the model has feedback, GPT-NeoX has none. Allowed: feedback=none." in capsys.readouterr().err
    assert not (tmp_path / "my exports").exists()
