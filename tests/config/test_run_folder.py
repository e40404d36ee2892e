"""Names of run folders, and what a resumed run takes over, keeps and refuses."""

import json
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from newllm.config.command_line import check_command_line
from newllm.config.compose import compose
from newllm.config.run_folder import latest_unfinished, override_hash, run_folder
from newllm.config.typed import config_hash, plain

NOW = datetime(2025, 1, 31, 12, 0, 5)
STARTED_WITH = ["model=infini", "trainer=lct", "stop_at_step=5", "runtime.num_threads=1"]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def leave_run(folder: Path, overrides: list[str], *, checkpoint: bool = True, done: bool = False) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"overrides": overrides}))
    (folder / "config.yaml").write_text(yaml.safe_dump(plain(compose(overrides))))
    if checkpoint:
        (folder / "checkpoints" / "last.ckpt").touch()
    if done:
        (folder / "DONE").touch()
    return folder


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        check_command_line(arguments, root="train")
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_folder_is_named_by_time_and_hash() -> None:
    config = compose(["name=first", "output_dir=runs"])

    assert run_folder(config, NOW) == Path(f"runs/first/2025-01-31_12-00-05_{config_hash(config)}")


def test_a_second_run_within_a_second_gets_its_own_folder() -> None:
    config = compose([])
    first = run_folder(config, NOW)
    first.mkdir(parents=True)

    assert run_folder(config, NOW) == first.with_name(f"{first.name}_2")


def test_a_cost_estimate_lies_outside_the_outputs() -> None:
    assert "outputs" not in run_folder(compose(["check=true"]), NOW).parts


@pytest.mark.parametrize("output_dir", ["file", "file/below", "/proc/none"])
def test_a_folder_that_takes_no_files_is_refused(output_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()

    message = refusal(capsys, [f"output_dir={output_dir}"])

    assert f"- output_dir={output_dir}: cannot be written to (" in message
    assert message == refusal(capsys, ["-m", "seed=0,1", f"output_dir={output_dir}"])
    assert check_command_line([f"output_dir={output_dir}", "check=true"], root="train")


def test_asking_whether_a_folder_takes_files_leaves_nothing() -> None:
    check_command_line(["output_dir=new/folder"], root="train")

    assert list(Path().iterdir()) == []


def test_override_hash_ignores_order_and_what_may_differ() -> None:
    name = override_hash(["model=infini", "seed=1"])

    assert override_hash(["seed=1", "model=infini", "runtime=gpu", "resume=auto"]) == name
    assert override_hash(["model=infini", "seed=2"]) != name


def test_resume_repeats_the_overrides_of_the_run_but_those_of_one_session() -> None:
    folder = leave_run(Path("runs/it's here"), STARTED_WITH)

    arguments = check_command_line([f"resume={str(folder)!r}", "runtime.num_threads=2"], root="train")

    assert arguments[:3] == ["model=infini", "trainer=lct", "runtime.num_threads=2"]
    config = compose(arguments)
    assert config.resume == str(folder)
    assert (config.stop_at_step, config.runtime.num_threads) == (None, 2)
    assert run_folder(config, NOW) == folder


def test_resume_refuses_another_configuration_with_the_difference(capsys: pytest.CaptureFixture[str]) -> None:
    folder = leave_run(Path("runs/first"), STARTED_WITH)

    message = refusal(capsys, [f"resume={folder}", "trainer.max_steps=2000", "seed=3", "logger=none"])

    assert "2 problems found" in message
    assert f"seed=3: the run in {folder} has 0. Allowed to differ when resuming: runtime, logger" in message
    assert "trainer.max_steps=2000: the run in" in message


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "has no checkpoints/last.ckpt"),
        ({"checkpoint": True, "done": True}, "is finished. Allowed: a run without DONE"),
    ],
)
def test_resume_refuses_a_run_that_cannot_go_on(state: dict, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = leave_run(Path("runs/first"), STARTED_WITH, **{"checkpoint": False, **state})

    assert message in refusal(capsys, [f"resume={folder}"])


def test_resume_refuses_a_folder_without_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert "resume=nowhere: there is no run (no run.json)" in refusal(capsys, ["resume=nowhere"])


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"overrides": 3}'])
def test_resume_refuses_a_damaged_record(content: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = leave_run(Path("runs/first"), STARTED_WITH)
    (folder / "run.json").write_text(content)

    assert "its run.json is damaged" in refusal(capsys, [f"resume={folder}"])


def test_resume_auto_takes_the_newest_unfinished_run_of_the_same_configuration() -> None:
    config = compose(["seed=4"])
    name = config_hash(config)
    runs = Path("outputs/train")
    leave_run(runs / f"2025-01-01_00-00-00_{name}", ["seed=4"])
    newest = leave_run(runs / f"2025-01-02_00-00-00_{name}", ["seed=4"])
    leave_run(runs / f"2025-01-03_00-00-00_{name}", ["seed=4"], done=True)
    leave_run(runs / f"2025-01-04_00-00-00_{name}", ["seed=4"], checkpoint=False)
    leave_run(runs / "2025-01-05_00-00-00_00000000", ["seed=5"])

    assert latest_unfinished(config) == newest
    assert compose(check_command_line(["seed=4", "resume=auto"], root="train")).resume == str(newest)


def test_resume_auto_starts_a_run_where_there_is_none() -> None:
    assert check_command_line(["seed=4", "resume=auto"], root="train") == ["seed=4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run: is missing"),
        (["run=nowhere"], "run=nowhere: there is no run (no run.json)"),
        (["run=runs/first"], "checkpoint=best: run=runs/first has no checkpoints/best.ckpt. Allowed: last."),
        (["run=runs/new"], "run=runs/new: has no checkpoint yet. Allowed: a folder train.py printed"),
        (["run=runs/plain", "checkpoint=last", "evaluation=[lag]"], "evaluation.lag: measures a recurrence"),
        (["run=runs/first", "trainer=lct"], "trainer=lct: is neither a group nor a key. Allowed: batch_size"),
        (["-m", "run=runs/first"], "-m: one run is evaluated at a time"),
    ],
)
def test_evaluate_refuses_what_it_cannot_measure(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_run(Path("runs/first"), STARTED_WITH)
    leave_run(Path("runs/plain"), [])
    leave_run(Path("runs/new"), [], checkpoint=False)

    with pytest.raises(SystemExit) as ended:
        check_command_line(arguments, root="evaluate")

    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_evaluate_accepts_a_run() -> None:
    leave_run(Path("runs/first"), STARTED_WITH)
    arguments = ["run=runs/first", "checkpoint=last", "evaluation=[lag,perplexity]"]

    assert check_command_line(arguments, root="evaluate") == arguments
