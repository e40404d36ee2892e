"""The programs themselves: answers without torch, exit codes, one block, run folders, nothing left by Hydra."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from newllm.config.command_line import check_command_line, no_empty_folder
from newllm.config.library import chosen_by_default, conf_folder, options

ROOT = Path(__file__).resolve().parents[2]
# Stands in for newllm.run, so that what Hydra does around a run can be seen without training.
STAND_IN = """
import runpy, sys, types
run = types.ModuleType("newllm.run")
def run_training(config, folder, overrides):
    print("got", type(config).__name__, folder, overrides, config.resume)
    return 0.5
run.run_training = run_training
sys.modules["newllm.run"] = run
sys.argv = ["train.py", *sys.argv[1:]]
sys.path.insert(0, {root!r})
import newllm.jobs.job
def run_fresh(script, arguments, log):
    print("job", *arguments[-2:])
    return 143
newllm.jobs.job.run_fresh = run_fresh
runpy.run_path({program!r}, run_name="__main__")
assert "torch" not in sys.modules
"""


def call(program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", str(ROOT / program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def call_stand_in(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    text = STAND_IN.format(root=str(ROOT), program=str(ROOT / "train.py"))
    return subprocess.run([sys.executable, "-c", text, *arguments], capture_output=True, text=True, cwd=cwd)


def imported(result: subprocess.CompletedProcess[str]) -> set[str]:
    return {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}


def message(result: subprocess.CompletedProcess[str]) -> str:
    return "\n".join(line for line in result.stderr.splitlines() if not line.startswith("import time:"))


@pytest.mark.parametrize("program", ["train.py", "evaluate.py"])
def test_help_answers_without_torch(program: str, tmp_path: Path) -> None:
    result = call(program, "--help", cwd=tmp_path)

    assert result.returncode == 0
    assert not {"torch", "lightning", "numpy"} & imported(result)
    for group in chosen_by_default(program.removesuffix(".py")):
        assert all(re.search(rf"[* ] {option} ", result.stdout) for option in options(group)), group
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("train.py", ["model=infni", "+unknown=1", "size.dim=abc", "trainer=lct", "trainer.sweeps=0"]),
        ("train.py", ["x=["]),
        ("train.py", ["--no-such-flag"]),
        ("train.py", ["--config-name", "other"]),
        ("train.py", ["-m", "seed=0,x"]),
        ("train.py", ["resume=nowhere"]),
        ("train.py", ["tokenizer=file"]),
        ("train.py", ["data=jsonl", "data.path=nowhere.txt", "tokenizer=file", "tokenizer.path=nowhere.json"]),
        ("train.py", ["-m", "data=jsonl", "data.path=nowhere.txt,nowhere.jsonl"]),
        ("train.py", ["data.validation=nowhere.txt", "embedding=run", "embedding.path=nowhere"]),
        ("evaluate.py", ["run=nowhere"]),
    ],
)
def test_mistakes_are_answered_in_one_block_without_torch(program: str, arguments: list[str], tmp_path: Path) -> None:
    result = call(program, *arguments, cwd=tmp_path)

    lines = message(result).splitlines()
    assert result.returncode == 2
    assert result.stdout == ""
    assert not {"torch", "lightning", "numpy"} & imported(result)
    assert re.fullmatch(r"newllm: nothing was started, \d problems? found:", lines[0])
    assert len(lines) > 1
    assert all(line.startswith("  - ") for line in lines[1:])
    assert list(tmp_path.iterdir()) == []


def test_help_whose_reader_has_gone_ends_without_a_word(tmp_path: Path) -> None:
    command = f"{sys.executable} {ROOT / 'train.py'} --help | (exec <&-)"

    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, cwd=tmp_path)

    assert (result.returncode, result.stderr) == (0, b"")


def test_a_run_gets_typed_values_and_a_folder_of_its_own(tmp_path: Path) -> None:
    result = call_stand_in("name=mine", "model=infini", cwd=tmp_path)

    folder = r"outputs/mine/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_[0-9a-f]{8}"
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(rf"got TrainConfig {folder} \['name=mine', 'model=infini'\] None\n", result.stdout)
    assert result.stderr == ""
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", ["a \u00f6, x", "it's (new) [1]", "123", "{a}", "a  b"])
def test_a_path_is_taken_letter_by_letter(name: str, tmp_path: Path) -> None:
    result = call_stand_in(f"output_dir={tmp_path / name}", f"data.cache_dir={name.replace(',', '')}", cwd=tmp_path)

    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"got TrainConfig {name}/train/")


def test_a_path_with_a_comma_is_several_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")

    assert (
        check_command_line(["-m", "data=jsonl", "data.path=a.txt,b.txt"], root="train")[-1] == "data.path=a.txt,b.txt"
    )


@pytest.mark.parametrize("name", ["a \u00f6, x", "123"])
def test_a_folder_that_is_not_there_is_told_as_it_was_written(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for key, root in (("run", "evaluate"), ("resume", "train")):
        with pytest.raises(SystemExit):
            check_command_line([f"{key}={name}"], root=root)

        assert f"{key}={name}: there is no run (no run.json)" in capsys.readouterr().err


def test_debug_nan_is_an_option_though_the_grammar_reads_a_number(tmp_path: Path) -> None:
    result = call_stand_in("debug=nan", "experiment=null", cwd=tmp_path)

    assert result.returncode == 0, result.stderr
    assert "outputs/debug/" in result.stdout


def test_jobs_of_a_sweep_have_folders_named_by_their_overrides(tmp_path: Path) -> None:
    first = call_stand_in("-m", "seed=0,1", "name=both", cwd=tmp_path)
    again = call_stand_in("-m", "name=both", "seed=1,0", "resume=auto", cwd=tmp_path)

    folders = [re.findall(r"hydra.run.dir='(outputs/both/[0-9a-f]{8})'", result.stdout) for result in (first, again)]
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert len(set(folders[0])) == 2
    assert folders[1] == folders[0][::-1]
    assert "resume" not in again.stdout


def test_a_job_of_a_sweep_resumes_its_own_folder(tmp_path: Path) -> None:
    folder = re.findall(r"hydra.run.dir='(\S+)'", call_stand_in("-m", "seed=0,1", cwd=tmp_path).stdout)[1]
    (tmp_path / folder / "checkpoints").mkdir(parents=True)
    (tmp_path / folder / "checkpoints" / "last.ckpt").touch()

    result = call_stand_in("-m", "seed=0,1", cwd=tmp_path)

    told = [line for line in result.stdout.splitlines() if line.startswith("job ")]
    assert [f"resume='{folder}'" in line for line in told if "hydra" in line] == [False, True]


@pytest.mark.parametrize("is_kept", [True, False])
def test_only_a_folder_with_a_run_in_it_stays(is_kept: bool, tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "mine" / "run"
    folder.mkdir(parents=True)

    if is_kept:
        (folder / "run.json").touch()

    with pytest.raises(SystemExit), no_empty_folder(folder):
        raise SystemExit(2)

    assert folder.exists() == is_kept
    assert (tmp_path / "outputs").exists()


def test_an_experiment_may_go_without_the_measurements_it_sets(tmp_path: Path) -> None:
    for mode in ([], ["-m"]):
        result = call_stand_in(*mode, "experiment=passkey", "evaluation=[]", "name=quick", cwd=tmp_path)

        assert result.returncode == 0, result.stderr
        assert ("job" if mode else "got TrainConfig outputs/quick/") in result.stdout


def test_cfg_shows_the_configuration(tmp_path: Path) -> None:
    result = call("train.py", "--cfg", "job", "--resolve", "trainer=lct", cwd=tmp_path)

    assert result.returncode == 0
    assert "feedback: additive" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_lists_the_keys_of_a_named_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        check_command_line(["trainer=lct", "layers.segment_length=3", "--help"], root="train")

    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert re.search(r"trainer\.cache=ram +disk, none, ram\n", text)
    assert re.search(r"trainer\.sweeps=1 +an integer at least 1, at most 65536, or auto\n", text)


def test_flags_may_stand_between_overrides() -> None:
    assert check_command_line(["seed=1", "--cfg", "job", "name=x"], root="train") == [
        "--cfg",
        "job",
        "seed=1",
        "name=x",
    ]


def test_conf_is_found_beside_the_package_and_inside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from newllm.config import library

    assert conf_folder() == ROOT / "conf"
    monkeypatch.setattr(library, "PACKAGE", tmp_path / "site" / "newllm")
    with pytest.raises(FileNotFoundError, match=r"conf: there is no train\.yaml in .*Install newllm again\."):
        conf_folder()
    (tmp_path / "site" / "newllm" / "conf").mkdir(parents=True)
    (tmp_path / "site" / "newllm" / "conf" / "train.yaml").touch()
    assert conf_folder() == tmp_path / "site" / "newllm" / "conf"
