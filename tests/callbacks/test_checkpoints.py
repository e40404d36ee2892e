import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tiny_run import TinyModule, fit

import newllm.whole_file
from newllm.callbacks.checkpoints import Checkpoints, WholeCheckpointIO
from newllm.callbacks.stop import StopAtStep


class SaveLog(Callback):
    """Notes when checkpoints were written."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.steps.append(trainer.global_step)


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def test_last_is_saved_every_n_steps_and_at_the_end(tmp_path: Path) -> None:
    saves, checkpoints = SaveLog(), Checkpoints(tmp_path, every_steps=3)

    fit(TinyModule(), [checkpoints, saves], max_steps=7, validate_every_batches=100)

    assert saves.steps == [3, 6, 7]
    assert load(checkpoints.last_path)["global_step"] == 7
    assert checkpoints.last_step == 7
    assert not checkpoints.best_path.exists()


def test_best_keeps_the_lowest_validation_loss(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, every_steps=100)

    fit(TinyModule(val_losses=[3.0, 1.0, 2.0]), [checkpoints], max_steps=6, validate_every_batches=2)

    assert load(checkpoints.best_path)["global_step"] == 4
    assert load(checkpoints.last_path)["global_step"] == 6
    assert (checkpoints.best_value, checkpoints.best_step) == (1.0, 4)


def test_nan_is_never_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, every_steps=100)

    fit(TinyModule(val_losses=[float("nan"), 2.0, float("nan")]), [checkpoints], max_steps=6, validate_every_batches=2)

    assert checkpoints.best_step == 4


def test_checkpoint_due_together_with_a_validation_is_written_once_and_after_it(tmp_path: Path) -> None:
    saves = SaveLog()

    fit(
        TinyModule(val_losses=[1.0, 2.0]),
        [Checkpoints(tmp_path, every_steps=2), saves],
        max_steps=4,
        validate_every_batches=2,
    )

    assert saves.steps == [2, 4]


def test_missing_monitor_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"monitor='val/perplexity': is not logged by validation. Allowed: .*val/loss"):
        fit(TinyModule(), [Checkpoints(tmp_path, every_steps=2, monitor="val/perplexity")], max_steps=3)


def test_sanity_validation_saves_nothing(tmp_path: Path) -> None:
    saves = SaveLog()

    fit(TinyModule(), [Checkpoints(tmp_path, every_steps=100), saves], max_steps=1, num_sanity_val_steps=1)

    assert saves.steps == [1]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stops", [(4,), (5,), (3, 6), (5, 6, 7)])
def test_interrupted_run_ends_like_the_uninterrupted_one(
    tmp_path: Path, stops: tuple[int, ...], accumulate: int
) -> None:
    """Validation every 3 steps, 5 batches an epoch: the stops fall on a validation, on an epoch's end and between."""
    options: dict[str, Any] = {"max_steps": 12, "accumulate": accumulate, "train_blocks": 10 * accumulate}
    options["validate_every_batches"] = 3 * accumulate
    straight, one = TinyModule(), Checkpoints(tmp_path / "straight", every_steps=4)
    fit(straight, [one], **options)

    resume, seen = None, list[int]()
    for stop in (*stops, None):
        module, two = TinyModule(), Checkpoints(tmp_path / "parts", every_steps=4)
        fit(module, [two] if stop is None else [StopAtStep(stop), two], resume=resume, **options)
        resume, seen = two.last_path, seen + module.seen

    assert seen == straight.seen
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), module.parameters(), strict=True))
    assert (one.best_value, one.best_step) == (two.best_value, two.best_step)
    ours, theirs = load(one.last_path), load(two.last_path)
    assert ours["lr_schedulers"][0]["last_epoch"] == theirs["lr_schedulers"][0]["last_epoch"] == 12


def test_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, every_steps=2)
    fit(TinyModule(), [checkpoints], max_steps=2, validate_every_batches=100)

    def write_half(checkpoint: dict[str, Any], file: BinaryIO) -> None:
        file.write(b"half of a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(OSError, match=r"last.ckpt: cannot be written .*No space left.* The one from before is whole"):
        fit(TinyModule(), [Checkpoints(tmp_path, every_steps=2)], max_steps=4, resume=checkpoints.last_path)

    assert load(checkpoints.last_path)["global_step"] == 2
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_file_size_limit_of_the_system_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    """The real thing: the system refuses to write more bytes while torch is writing."""
    path = tmp_path / "last.ckpt"
    code = (
        "import resource, sys, torch; from newllm.callbacks.checkpoints import WholeCheckpointIO\n"
        f"WholeCheckpointIO().save_checkpoint({{'step': 1}}, {str(path)!r})\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({1 << 16}, {resource.RLIM_INFINITY}))\n"
        "try:\n"
        f"    WholeCheckpointIO().save_checkpoint({{'step': 2, 'weights': torch.zeros({1 << 18})}}, {str(path)!r})\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )

    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "last.ckpt: cannot be written" in answer.stdout
    assert load(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".last.ckpt.77.tmp").write_text("half")

    fit(TinyModule(), [Checkpoints(tmp_path, every_steps=1)], max_steps=1)

    assert sorted(os.listdir(tmp_path)) == ["last.ckpt"]


def test_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    whole = WholeCheckpointIO()
    whole.save_checkpoint({"weights": torch.zeros(100)}, tmp_path / "last.ckpt")
    content = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.ckpt").write_text("hello")

    for name in ("last.ckpt", "text.ckpt"):
        with pytest.raises(ValueError, match=rf"{name}: is damaged or no checkpoint"):
            whole.load_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match=r"none.ckpt: is no checkpoint"):
        whole.load_checkpoint(tmp_path / "none.ckpt")


def test_checkpoint_that_needs_more_than_plain_containers_is_refused(tmp_path: Path) -> None:
    whole = WholeCheckpointIO()
    whole.save_checkpoint({"path": Path("somewhere")}, tmp_path / "last.ckpt")

    with pytest.raises(ValueError, match=r"last.ckpt: is damaged or no checkpoint"):
        whole.load_checkpoint(tmp_path / "last.ckpt")


def test_bytes_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    sync, replace = os.fsync, os.replace

    def note_sync(number: int) -> None:
        calls.append("fsync")
        sync(number)

    def note_replace(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(newllm.whole_file.os, "fsync", note_sync)
    monkeypatch.setattr(newllm.whole_file.os, "replace", note_replace)

    WholeCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")

    assert calls == ["fsync", "replace", "fsync"]
