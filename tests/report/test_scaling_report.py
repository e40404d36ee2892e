"""Power laws over the runs of a sweep: what belongs together, what is refused, what is written."""

import json
from pathlib import Path
from typing import Any

import pytest
from made_runs import exit_code, write_run

from newllm.report.collect import collect
from newllm.report.scaling import main, progressions

BLOCKS = (50, 100, 200, 400, 800)


def write_sizes(folder: Path, *, model: str = "context", blocks: tuple[int, ...] = BLOCKS, **changes: Any) -> Path:
    """Runs of three seeds on every size, on the law 2 + 30 N^-0.4, moved a little by their seeds."""
    for count in blocks:
        for seed in range(3):
            size = 128 * count
            loss = 2 + 30 * size**-0.4 + 0.002 * (seed - 1) * (1 if count != 100 else -2)
            validation = {"documents": 2, "targets": 640, "bytes": 2000} | changes.get("validation", {})
            write_run(
                folder / f"{model}_{count}_{seed}",
                seed=seed,
                losses=(6.0, loss),
                config={
                    "model": {"kind": model},
                    "data": {"max_train_blocks": count},
                    "trainer": {"max_steps": changes.get("max_steps", count)},
                },
                data={"splits": {"train": {"targets": size}, "validation": validation}},
                status=changes.get("status", "finished"),
            )
    return folder


def test_the_command_writes_numbers_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sizes(tmp_path)

    assert main([str(tmp_path), "--resamples", "50"]) == 0

    (found,) = json.loads((tmp_path / "alpha_progression.json").read_text())
    low, high = found["all_sizes"]["power_law"]["alpha_interval_95"]
    assert low <= 0.4 <= high
    assert [window["sizes"] for window in found["windows"]] == [
        [128 * count for count in BLOCKS[:4]],
        [128 * count for count in BLOCKS[1:]],
    ]
    assert len(found["changes"]) == 1
    assert found["all_sizes"]["without_irreducible_loss"]["alpha"] < 0.2
    assert {point["seed"] for point in found["points"]} == {0, 1, 2}
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "window 2" in capsys.readouterr().out


def test_each_configuration_has_its_own_law(tmp_path: Path) -> None:
    write_sizes(tmp_path)
    write_sizes(tmp_path, model="pythia", blocks=BLOCKS[:3])

    found = progressions(collect([tmp_path])[0], resamples=20)

    assert sorted((p.label, len(p.windows)) for p in found) == [("model=context", 2), ("model=pythia", 1)]


def test_runs_that_are_not_finished_are_counted(tmp_path: Path) -> None:
    write_sizes(tmp_path)
    write_sizes(tmp_path / "more", blocks=(1600,), status="failed")

    (found,) = progressions(collect([tmp_path])[0], resamples=20)

    assert found.unfinished == 3
    assert len(found.points) == 15


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max_steps": 50}, "steps per training token"),
        ({"validation": {"targets": 641}}, "validated on different texts"),
    ],
)
def test_sizes_that_differ_in_more_than_size_are_refused(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    write_sizes(tmp_path, blocks=BLOCKS[:3])
    write_sizes(tmp_path / "wrong", blocks=(400,), **wrong)

    with pytest.raises(ValueError, match=said):
        progressions(collect([tmp_path])[0], resamples=20)


@pytest.mark.parametrize("blocks", [(), (50, 100)])
def test_too_few_sizes_are_refused_with_what_to_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], blocks: tuple[int, ...]
) -> None:
    write_sizes(tmp_path, blocks=blocks)

    assert exit_code(main, [str(tmp_path)]) == 2

    told = capsys.readouterr().err
    assert "at least 3" in told
    assert "Type: python train.py experiment=scaling" in told
    assert not (tmp_path / "alpha_progression.json").exists()
