"""Scaling laws asked for from the command line: refused before training, made over the finished runs of a sweep."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from newllm.config.compose import examine

ROOT = Path(__file__).parents[2]


def command(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / script, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_a_run_that_is_yet_to_be_trained_cannot_be_compared() -> None:
    _, problems = examine(["evaluation=[perplexity,scaling]"], "train")

    assert len(problems) == 1
    assert problems[0].startswith("evaluation=[scaling]: compares finished runs, this one has yet to be trained.")


@pytest.mark.slow
def test_one_command_trains_all_sizes_and_another_fits_them(tmp_path: Path) -> None:
    few = ["runtime.num_threads=1", "data.max_validation_blocks=2", "data.block_length=16", "data.max_unseen=1"]
    sizes, seeds = "data.max_train_blocks=10,20", "seed=0"
    place = [f"output_dir={tmp_path}", "schedule.warmup_steps=2", "evaluation=[]", *few]

    trained = command("train.py", "experiment=scaling", sizes, seeds, *place)
    assert trained.returncode == 0, trained.stderr[-2000:]
    runs = sorted(path.parent for path in (tmp_path / "scaling").glob("*/DONE"))
    refused = command("evaluate.py", f"run={runs[0]}", "evaluation=[scaling]")
    more = command("train.py", "experiment=scaling", "data.max_train_blocks=40", seeds, *place)
    assert more.returncode == 0, more.stderr[-2000:]
    fitted = command("evaluate.py", f"run={runs[0]}", "evaluation=[scaling]")

    assert len(runs) == 2
    assert refused.returncode == 2
    assert "2 points of 2 sizes carry no fit" in refused.stderr
    assert "Type: python train.py experiment=scaling" in refused.stderr
    assert fitted.returncode == 0, fitted.stderr[-2000:]
    (found,) = json.loads((tmp_path / "scaling" / "alpha_progression.json").read_text())
    assert [point["size"] for point in found["points"]] == [160, 320, 640]
    assert (tmp_path / "scaling" / "scaling.png").is_file()
