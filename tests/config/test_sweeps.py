"""Every job of a sweep is checked before the first starts."""

from pathlib import Path

import pytest

from newllm.config import sweeps
from newllm.config.command_line import check_command_line, sweep_output
from newllm.config.compose import compose
from newllm.config.run_folder import override_hash
from newllm.config.sweeps import examine_jobs
from newllm.config.typed import config_hash


def test_a_possible_sweep_has_no_problems() -> None:
    assert examine_jobs(["model=pythia,infini", "trainer=lct,sequential", "seed=range(0,3)"], "train") == []


def test_problems_name_the_jobs_that_have_them() -> None:
    problems = examine_jobs(["model=infini", "trainer=lct,standard", "model.feedback=none,gated", "seed=0,1"], "train")

    assert len(problems) == 2
    assert problems[0].startswith("trainer=lct: trains a recurrence, model.feedback=none has none.")
    assert problems[0].endswith("(in 2 of 8 jobs checked, for example trainer=lct model.feedback=none seed=0)")
    assert problems[1].startswith("trainer=standard: cannot train a recurrence, model.feedback=gated is one.")


def test_a_mistake_of_all_jobs_is_told_as_that_of_one() -> None:
    assert [text.partition(": ")[0] for text in examine_jobs(["modl=infini", "seed=0,1"], "train")] == ["modl=infini"]


@pytest.mark.parametrize(
    ("overrides", "given"),
    [
        (["size=nano,mega"], "size=nano,mega"),
        (["seed=choice(0,x)"], "seed=x"),
        (["optimizer.lr=interval(-1,1)"], "optimizer.lr=-1"),
        (["schedule=glob(*)", "schedule.warmup_steps=5000"], "schedule.warmup_steps=5000"),
        (["seed=range(3,3)"], "seed=range(3,3)"),
        (["seed=1,2", "x=["], "x=["),
    ],
)
def test_every_form_of_several_values_is_looked_at(overrides: list[str], given: str) -> None:
    problems = examine_jobs(overrides, "train")

    assert len(problems) == 1
    assert problems[0].startswith(given.split(",")[0] if "mega" not in given else "size=mega"), problems


def test_a_large_sweep_is_checked_value_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    monkeypatch.setattr(sweeps, "examine", lambda job, root: (looked_at.append(job), (None, []))[1])

    examine_jobs(["seed=range(0,100)", "optimizer.lr=1e-3,1e-4,1e-5", "model=pythia"], "train")

    assert len(looked_at) == 100 + 2
    assert {job[0] for job in looked_at} == {f"seed={seed}" for seed in range(100)}


def test_the_command_line_overrides_a_sweep_in_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = {"trainer": "lct,standard", "model.feedback": "gated"}
    monkeypatch.setattr(sweeps, "hydra_setting", lambda root, overrides, key: parameters)

    assert len(examine_jobs([], "train")) == 1
    assert examine_jobs(["trainer=lct"], "train") == []


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_sweeps_are_checked_at_the_door(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        check_command_line([flag, "seed=0,-1"], root="train")

    assert ended.value.code == 2
    assert "seed=-1: is out of range" in capsys.readouterr().err
    assert check_command_line([flag, "seed=0,1", "experiment=null"], root="train") == ["--multirun", "seed=0,1"]


def test_one_folder_for_many_jobs_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check_command_line(["-m", "seed=0,1", "resume=outputs/one"], root="train")

    assert "resume=outputs/one: is one folder for many jobs." in capsys.readouterr().err


@pytest.mark.parametrize("plugin", ["hydra/launcher=joblib", "hydra/launcher=submitit_slurm", "hydra/sweeper=optuna"])
def test_a_launcher_that_is_not_installed_names_its_extra(
    plugin: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweeps, "find_spec", lambda name: None)

    with pytest.raises(SystemExit) as ended:
        check_command_line(["-m", "seed=0,1", plugin], root="train")

    assert ended.value.code == 2
    assert f"{plugin}: is not installed. Allowed here: {plugin.partition('=')[0]}=basic." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["--multirun", "seed=0,1"], Path("outputs")),
        (["--multirun", "seed=0,1", "output_dir=/data/runs"], Path("/data/runs")),
        (["sweep=skip_interval"], Path("outputs")),
        (["seed=0"], None),
        (["sweep=skip_interval", "hydra.mode=RUN"], None),
        (["--multirun", "--cfg", "job", "seed=0,1"], None),
    ],
)
def test_a_sweep_is_known_by_its_command_line(arguments: list[str], folder: Path | None) -> None:
    assert sweep_output(arguments, root="train") == folder


def test_keys_that_only_swept_options_bring_are_left_to_the_jobs() -> None:
    arguments = ["-m", "sweep=reversal", "data.reverse=true", "seed=0,1", "data.num_people=20"]

    found = check_command_line(arguments, root="train")

    assert found[:-1] == ["--multirun", "sweep=reversal", "seed=0,1"]
    assert found[-1] == "++hydra.sweeper.params={data.reverse:'true',data.num_people:'20'}"
    assert examine_jobs(found[1:], "train") == []


def test_keys_that_every_configuration_has_stay_where_they_are() -> None:
    arguments = ["--multirun", "model=pythia,infini", "optimizer.lr=1e-3", "seed=0"]

    assert check_command_line(arguments, root="train") == arguments


@pytest.mark.parametrize(
    ("overrides", "given"),
    [
        (["hydra/launcher=nonsense", "seed=0,1"], "hydra/launcher=nonsense"),
        (["hydra.nope=3", "seed=0,1"], "hydra.nope=3"),
        (["modl=a,b", "seed=0,1"], "modl=a,b"),
        (["trainer.max_steps=a,b,1000"], "trainer.max_steps=a,b"),
    ],
)
def test_one_mistake_is_told_once_for_all_jobs(overrides: list[str], given: str) -> None:
    assert [problem.partition(": ")[0] for problem in examine_jobs(overrides, "train")] == [given]


@pytest.mark.parametrize(
    "text", ["runtime.num_threads=1,2", "runtime=cpu,ddp_cpu", "data.num_workers=0,1", "logger=csv,none"]
)
def test_a_sweep_over_what_decides_nothing_is_refused_for_its_jobs_would_share_a_folder(text: str) -> None:
    (problem,) = examine_jobs([text, "seed=0,1"], "train")

    assert problem.startswith(f"{text}: decides where and how a job runs")


def test_precisions_are_jobs_of_their_own() -> None:
    jobs = [["runtime.precision=32-true"], ["runtime.precision=64-true"]]

    assert examine_jobs(["runtime.precision=32-true,64-true"], "train") == []
    assert len({override_hash(job) for job in jobs}) == len({config_hash(compose(job)) for job in jobs}) == 2
