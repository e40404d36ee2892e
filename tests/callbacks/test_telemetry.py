import math
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import metadata as custom_scalars
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata as hparams
from tiny_run import BATCH, BLOCK, TinyModule, fit

from newllm.callbacks.checkpoints import Checkpoints
from newllm.callbacks.peak import peak_flops
from newllm.callbacks.stop import StopAtStep
from newllm.callbacks.telemetry import Telemetry
from newllm.callbacks.tensorboard import LAYOUT, TensorBoard
from newllm.run_record import append_metrics, read_metrics

STEP_TOKENS = BATCH * BLOCK


def train(folder: Path, *callbacks: Callback, board: bool = False, every: int = 2, **options: Any) -> Telemetry:
    chart = TensorBoard(folder / "tensorboard")
    telemetry = Telemetry(folder, log_every_steps=every, loggers=[chart] if board else [])
    options = {"max_steps": 12, **options}
    module = options.pop("module", None) or TinyModule()
    fit(module, [telemetry, *callbacks, Checkpoints(folder / "checkpoints", every_steps=4)], **options)
    if board:
        chart.close()
    return telemetry


def without_speed(folder: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in line.items() if not name.startswith("speed/")} for line in read_metrics(folder)
    ]


def curves(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_lines_come_every_n_steps_and_with_every_validation(tmp_path: Path) -> None:
    train(tmp_path, max_steps=7, validate_every_batches=3)

    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 7]
    assert [line["tokens"] for line in lines] == [STEP_TOKENS * step for step in (2, 3, 4, 6, 7)]
    assert [line["step"] for line in lines if "val/loss" in line] == [3, 6]


def test_log_step_holds_loss_rate_norm_and_speed(tmp_path: Path) -> None:
    train(tmp_path, max_steps=2)

    (line,) = read_metrics(tmp_path)
    assert set(line) == {
        *("step", "tokens", "train/loss", "optim/lr", "optim/grad_norm"),
        *("speed/tokens_per_second", "speed/data_wait_share"),
    }
    assert line["optim/lr"] == 0.01 / 2  # of the second step, not of the one to come
    assert line["optim/grad_norm"] > 0
    assert line["speed/tokens_per_second"] > 0
    assert 0 <= line["speed/data_wait_share"] <= 1


def test_value_that_was_not_logged_again_is_not_repeated(tmp_path: Path) -> None:
    train(tmp_path, module=TinyModule(logs_rarely_every=6))

    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines if "lag/contraction" in line] == [6, 12]
    assert len({line["train/loss"] for line in lines}) == len(lines)


def test_what_later_callbacks_log_stands_in_the_same_line(tmp_path: Path) -> None:
    class Late(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            pl_module.log("lag/relative_error", torch.tensor(float(trainer.global_step)))

    train(tmp_path, Late(), max_steps=4)

    found = {
        line["step"]: line["lag/relative_error"] for line in read_metrics(tmp_path) if "lag/relative_error" in line
    }
    assert found[2] == 2.0
    assert found[4] == 4.0


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    train(tmp_path, max_steps=4, accumulate=2, train_blocks=20, validate_every_batches=100)

    assert [(line["step"], line["tokens"]) for line in read_metrics(tmp_path)] == [
        (2, 4 * STEP_TOKENS),
        (4, 8 * STEP_TOKENS),
    ]


@pytest.mark.parametrize("stop", [3, 4, 5, 6, 8])
def test_resumed_run_leaves_the_lines_of_the_uninterrupted_one(tmp_path: Path, stop: int) -> None:
    """Stops on a log step, on a validation, on both, on neither; a killed session has written ahead of its checkpoint."""
    train(tmp_path / "straight")

    train(tmp_path / "parts", StopAtStep(stop))
    append_metrics(tmp_path / "parts", {"step": stop + 1, "tokens": 1, "train/loss": 99.0})
    telemetry = train(tmp_path / "parts", resume=tmp_path / "parts/checkpoints/last.ckpt")

    assert without_speed(tmp_path / "parts") == without_speed(tmp_path / "straight")
    assert telemetry.tokens == 12 * STEP_TOKENS


def test_run_that_begins_again_in_its_folder_starts_from_nothing(tmp_path: Path) -> None:
    append_metrics(tmp_path, {"step": 2, "tokens": 1, "train/loss": 99.0})

    train(tmp_path, max_steps=2)

    assert [line["tokens"] for line in read_metrics(tmp_path)] == [2 * STEP_TOKENS]


def test_crash_keeps_the_open_line(tmp_path: Path) -> None:
    class Crash(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 2:
                raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        train(tmp_path, Crash())

    assert [line["step"] for line in read_metrics(tmp_path)] == [2]


def test_waiting_for_data_is_told_apart_from_other_callbacks(tmp_path: Path) -> None:
    class SlowCallback(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            time.sleep(0.05)

    class SlowFetch(TinyModule):
        def on_train_batch_start(self, *_: Any) -> None:
            time.sleep(0.01)

    telemetry = train(tmp_path, SlowCallback(), module=SlowFetch(), max_steps=4, validate_every_batches=100)

    last = read_metrics(tmp_path)[-1]
    assert last["speed/data_wait_share"] < 0.5
    assert telemetry.tokens_per_second > STEP_TOKENS / 0.05


def test_slow_data_shows_as_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = tiny_run.Blocks.__getitem__

    def slow_fetch(blocks: tiny_run.Blocks, index: int) -> dict[str, torch.Tensor]:
        time.sleep(0.05)
        return fetch(blocks, index)

    monkeypatch.setattr(tiny_run.Blocks, "__getitem__", slow_fetch)

    telemetry = train(tmp_path, max_steps=2, validate_every_batches=100)

    (line,) = read_metrics(tmp_path)
    assert line["speed/data_wait_share"] > 0.5
    assert line["speed/tokens_per_second"] == telemetry.tokens_per_second < STEP_TOKENS / (BATCH * 0.05)


def test_record_adds_to_the_last_line(tmp_path: Path) -> None:
    telemetry = train(tmp_path, max_steps=4, validate_every_batches=100)
    before = read_metrics(tmp_path)

    telemetry.record({"val/loss": 1.25})

    assert read_metrics(tmp_path) == [*before[:-1], {**before[-1], "val/loss": 1.25}]
    assert telemetry.last["val/loss"] == 1.25


def test_loss_that_is_not_finite_is_recorded(tmp_path: Path) -> None:
    train(tmp_path, module=TinyModule(val_losses=[math.nan]), max_steps=3)

    assert math.isnan(next(line["val/loss"] for line in read_metrics(tmp_path) if "val/loss" in line))


def test_tensorboard_shows_the_same_numbers(tmp_path: Path) -> None:
    train(tmp_path, board=True, max_steps=6)

    events, lines = curves(tmp_path), read_metrics(tmp_path)
    for name in ("train/loss", "val/loss", "speed/tokens_per_second", "optim/lr"):
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert shown == pytest.approx({line["step"]: line[name] for line in lines if name in line}, rel=1e-6)


def test_tensorboard_hides_the_steps_that_a_resumed_run_makes_again(tmp_path: Path) -> None:
    train(tmp_path, StopAtStep(5), board=True)
    train(tmp_path, board=True, resume=tmp_path / "checkpoints/last.ckpt")

    steps = [event.step for event in curves(tmp_path).Scalars("train/loss")]
    assert steps == sorted(set(steps))
    assert steps == [line["step"] for line in read_metrics(tmp_path) if "train/loss" in line]


def test_tensorboard_has_a_layout_and_the_hyperparameters_with_final_metrics(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "tensorboard")
    board.scalars(3, {"val/loss": 2.0})
    board.texts("samples", ["# not a heading\nline two"], 3)

    config = {"model": {"kind": "infini", "stack": ["a", "b"], "freeze": True}, "seed": 0, "runtime": {"devices": 1}}
    board.summary(config, {"val/loss": 2.0})
    board.close()

    events = curves(tmp_path)
    packed = events.Tensors(custom_scalars.CONFIG_SUMMARY_TAG)[0].tensor_proto.string_val[0]
    assert [category.title for category in Layout.FromString(packed).category] == [*LAYOUT]
    start = events.PluginTagToContent(hparams.PLUGIN_NAME)[hparams.SESSION_START_INFO_TAG]
    settings = hparams.parse_session_start_info_plugin_data(start).hparams
    texts = {key: value.string_value for key, value in settings.items() if key != "seed"}
    assert texts == {"model.kind": "infini", "model.stack": "['a', 'b']", "model.freeze": "True"}
    assert settings["seed"].number_value == 0
    experiment = events.PluginTagToContent(hparams.PLUGIN_NAME)[hparams.EXPERIMENT_TAG]
    assert [info.name.tag for info in hparams.parse_experiment_plugin_data(experiment).metric_infos] == ["val/loss"]
    assert b"    # not a heading" in events.Tensors("samples/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16-mixed", 989e12),
        ("NVIDIA H100 PCIe", "bf16-true", 756e12),
        ("NVIDIA A100-SXM4-80GB", "32-true", 19.5e12),
        ("Tesla T4", "16-mixed", 65e12),
        ("NVIDIA L40S", "bf16-mixed", 362e12),
        ("cpu", "32-true", None),
        ("NVIDIA H200", "64-true", None),
        ("NVIDIA L40", "bf16-mixed", None),  # neither L4 nor L40S
        ("NVIDIA RTX A4000", "bf16-mixed", None),  # no A40
        ("NVIDIA RTX A1000", "bf16-mixed", None),  # no A100
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16-mixed", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed", None),
    ],
)
def test_peak_is_known_by_device_and_precision(device: str, precision: str, peak: float | None) -> None:
    assert peak_flops(device, precision) == peak


def test_mfu_is_the_share_of_the_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("newllm.callbacks.telemetry.peak_flops", lambda *_: 1e9)
    telemetry = Telemetry(tmp_path, log_every_steps=2, loggers=[], train_flops_per_token=1000)

    fit(TinyModule(), [telemetry], max_steps=2, enable_checkpointing=False)

    (line,) = read_metrics(tmp_path)
    assert line["speed/mfu"] == pytest.approx(line["speed/tokens_per_second"] * 1000 / 1e9)
