"""Files that a configuration names are looked for before anything is built."""

from pathlib import Path

import pytest
import yaml

from newllm.config.compose import compose
from newllm.config.named_files import missing_files
from newllm.config.schema import TrainConfig
from newllm.config.typed import plain


def config(*overrides: str) -> TrainConfig:
    found = compose(list(overrides))
    assert isinstance(found, TrainConfig)
    return found


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ("data=jsonl", "data.path=gone.txt"),
            "data.path=gone.txt: does not exist. Allowed: a file, folder or pattern",
        ),
        (("data.validation=gone.txt",), "data.validation=gone.txt: does not exist. Allowed: a file, folder or pattern"),
        (("data=chat", "data.validation=gone.jsonl"), "data.validation=gone.jsonl: does not exist."),
        (
            ("tokenizer=file", "tokenizer.path=gone.json"),
            "tokenizer.path=gone.json: does not exist. Allowed: a tokenizer.json.",
        ),
        (("embedding=run", "embedding.path=gone"), "embedding.path=gone: does not exist. Allowed: the folder of a run"),
    ],
)
def test_what_is_not_there_is_told(
    overrides: tuple[str, ...], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    (found,) = missing_files(config(*overrides))

    assert found.startswith(sentence)


PHASE_2 = ("model=context", "trainer=cvfp_phase2", "trainer.phase1=runs/first")


def leave_phase_1(folder: Path, *overrides: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text("{}")
    (folder / "config.yaml").write_text(yaml.safe_dump(plain(config(*overrides))))
    (folder / "DONE").touch()


@pytest.mark.parametrize("inside", [".", "phase1"])
def test_a_phase_1_of_another_kind_or_model_is_told_before_anything_is_built(
    inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "first" / inside
    allowed = "Allowed: the folder of a finished run of trainer=cvfp_phase1 or cvfp."
    model = ("model=context", "trainer=cvfp_phase1", "model.context_dim=24")

    assert missing_files(config(*PHASE_2))[0].startswith(
        f"trainer.phase1=runs/first: there is no run (no run.json). {allowed}"
    )
    leave_phase_1(folder, "trainer=standard")
    assert missing_files(config(*PHASE_2)) == [
        f"trainer.phase1=runs/first: is a run of trainer=standard. {allowed} Name one of these."
    ]
    leave_phase_1(folder, *model)
    (found,) = missing_files(config(*PHASE_2))
    assert found.startswith(
        "trainer.phase1=runs/first: is of another model or text: model.context_dim is 24 there and "
    )
    assert missing_files(config(*PHASE_2, "model.context_dim=24")) == []
    (folder / "DONE").unlink()
    (found,) = missing_files(config(*PHASE_2, "model.context_dim=24"))
    assert "has not finished (no DONE)." in found
    assert f"resume={(Path('runs/first') / inside)}" in found
    (folder / "config.yaml").write_text("- nothing")
    (found,) = missing_files(config(*PHASE_2))
    assert "is empty or no run's configuration" in found


@pytest.mark.parametrize(
    "overrides",
    [(), ("data.validation=0:3",), ("data=chat", "data.validation=2:4"), (*PHASE_2, "trainer.phase1=untrained")],
)
def test_configurations_that_name_no_file_miss_none(overrides: tuple[str, ...]) -> None:
    assert missing_files(config(*overrides)) == []


def test_what_is_there_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("text.txt", "held_out.txt", "run/checkpoints/best.ckpt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("text")

    given = ("data=jsonl", "data.path=text.txt", "data.validation=held_out.txt", "embedding=run", "embedding.path=run")

    assert missing_files(config(*given)) == []
    (tmp_path / "run/checkpoints/best.ckpt").unlink()
    assert "embedding.path=run: is a folder without checkpoints/best.ckpt." in missing_files(config(*given))[0]


def test_a_resumed_run_needs_neither_its_tokenizer_nor_where_its_embedding_came_from() -> None:
    gone = ("tokenizer=file", "tokenizer.path=gone.json", "embedding=run", "embedding.path=gone")

    assert missing_files(config(*gone, "resume=somewhere")) == []
    assert len(missing_files(config(*gone))) == 2
