"""Sweeps on real launchers and a real sweeper: what fails is told, the others go on, and only it is tried again."""

import os
import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from newllm.jobs.record import JobRecord, read_records

ROOT = Path(__file__).parents[2]
TINY = [
    *("model=pythia", "size.dim=8", "size.num_layers=1", "size.num_heads=2", "size.mlp_dim=16", "data=delay_copy"),
    *("debug=fast", "trainer.max_steps=6", "callbacks=quiet", "logger=none", "evaluation=[]", "name=tiny"),
    *("guards.max_nonfinite_steps=0", "runtime.num_threads=1"),
]
# Jobs of six steps; those whose NaN comes at step 5 fail. Each of ray's starts Python anew.
SEEDS = ["1", "2"]
NAN_AT_STEP = {"joblib": ["7", "5", "8", "9", "10", "11"], "ray": ["7", "5"]}
LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "ray": [
        *("hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=4", "+hydra.launcher.ray.init.num_gpus=2"),
        *("+hydra.launcher.ray.init.include_dashboard=false", "+hydra.launcher.ray.remote.num_gpus=1"),
    ],
}

pytestmark = pytest.mark.slow


def has_plugin(name: str) -> bool:
    return find_spec("hydra_plugins") is not None and find_spec(f"hydra_plugins.{name}") is not None


def needs(plugin: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not has_plugin(plugin), reason=f"the package {plugin} is not installed")


def sweep(folder: Path, *arguments: str) -> tuple[CompletedProcess[str], list[JobRecord]]:
    """Run a sweep; return how it ended and the records of its jobs."""
    before = set(folder.glob("outputs/sweeps/*"))
    given = [sys.executable, str(ROOT / "train.py"), "-m", *TINY, *arguments]
    # Ray's workers give way to every other process (niceness 15): beside other tests they would hardly run.
    environment = {**os.environ, "COLUMNS": "200", "RAY_worker_niceness": "0"}
    result = subprocess.run(given, cwd=folder, capture_output=True, text=True, env=environment)
    (records,) = set(folder.glob("outputs/sweeps/*")) - before or [folder / "none"]
    return result, list(read_records(records))


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param("joblib", marks=needs("hydra_joblib_launcher")),
        pytest.param("ray", marks=needs("hydra_ray_launcher")),
    ],
)
def test_of_many_jobs_two_fail(launcher: str, tmp_path: Path) -> None:
    steps = NAN_AT_STEP[launcher]
    number = len(SEEDS) * len(steps)
    jobs = [*LAUNCHERS[launcher], f"seed={','.join(SEEDS)}", f"guards.plant_nan_at_step={','.join(steps)}"]
    first, records = sweep(tmp_path, *jobs)
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("outputs/tiny/*/checkpoints/last.ckpt")}
    again, records_again = sweep(tmp_path, *jobs)

    assert first.returncode == again.returncode == 1, first.stderr
    assert Counter(record.status for record in records) == {"done": number - 2, "failed": 2}
    failed = [record for record in records if record.has_failed]
    assert all("guards.plant_nan_at_step=5" in record.overrides for record in failed)
    assert Counter(record.status for record in records_again) == {"skipped": number - 2, "failed": 2}, again.stderr
    assert [record.val_loss for record in records if not record.has_failed] == [
        record.val_loss for record in records_again if not record.has_failed
    ]
    finished = [path for path in done if (path.parents[1] / "DONE").exists()]
    assert len(finished) == number - 2
    assert all(path.stat().st_mtime_ns == done[path] for path in finished)

    assert f"{number} jobs: " in first.stdout
    assert len(re.findall(r"^ +\d+  [0-9a-f]{8}  (?:done|failed) ", first.stdout, flags=re.MULTILINE)) == number
    told = re.findall(
        r"^job \d+ \(\w+\) FAILED: GuardFailure.*\n  overrides: .*plant_nan_at_step=5.*\n  log: (.*)$",
        first.stderr,
        flags=re.MULTILINE,
    )
    assert len(told) == 2
    assert all("a guard failed" in (tmp_path / log).read_text() for log in told)
    # At once: others end after the first failure was told.
    assert re.search(r"^job \d+ \(\w+\) done", first.stderr.split(" FAILED: ", 1)[1], flags=re.MULTILINE)
    _check_devices(launcher, records)


def _check_devices(launcher: str, records: list[JobRecord]) -> None:
    """Two devices, and never two jobs at a time on one."""
    if launcher != "ray":
        return
    assert {record.device for record in records} == {"0", "1"}
    for device in ("0", "1"):
        spans = sorted((r.started or 0.0, r.seconds or 0.0) for r in records if r.device == device)
        assert all(start + length <= later for (start, length), (later, _) in pairwise(spans))


@needs("hydra_optuna_sweeper")
def test_a_search_minimises_the_validation_loss(tmp_path: Path) -> None:
    result, records = sweep(
        *(tmp_path, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=1"),
        *("hydra.sweeper.sampler.seed=0", "hydra.sweeper.max_failure_rate=1", "seed=1"),
        "optimizer.lr=tag(log, interval(1e-4, 1e-2))",
    )

    assert result.returncode == 0, result.stderr
    assert [record.status for record in records] == ["done"] * 4
    rates = [float(text.partition("=")[2]) for r in records for text in r.overrides if text.startswith("optimizer.lr=")]
    assert len(set(rates)) == 4
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    best = min(record.val_loss for record in records if record.val_loss is not None)
    found = (next(tmp_path.glob("outputs/tiny/optimization_results.yaml"))).read_text()
    assert float(re.search(r"best_value: (\S+)", found)[1]) == best  # type: ignore[index]
