import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from small_runs import FEEDBACK, SmallRun
from torch import Tensor, nn

from newllm.callbacks.checkpoints import Checkpoints
from newllm.callbacks.stop import StopAtStep
from newllm.data.blocks import Blocks
from newllm.guards.events import keep_events, read_events, write_event
from newllm.guards.step import skip_if_bad
from newllm.guards.verdict import GuardFailure
from newllm.layers.feedback import Feedback

SAFE = "guards.spike_deviations=1000"  # so that a run of a few steps has no spikes by chance


@pytest.mark.parametrize("overrides", [("model=pythia",), FEEDBACK], ids=["standard", "lct"])
def test_a_clean_run_passes_every_guard(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    run = SmallRun(tmp_path, SAFE, *overrides, floor=True).fit()

    has_feedback = overrides == FEEDBACK
    found = {name: verdict.status for name, verdict in run.verdicts.items()}
    assert found == {
        "finite_steps": "passed",
        "loss_spikes": "passed",
        "leak": "passed",
        "validation_gap": "passed",
        "deployment_loss": "passed" if has_feedback else "not applicable",
        "gradients": "passed",
    }
    assert run.verdicts["finite_steps"].figures == {"skipped_steps": 0, "steps": 12}
    assert read_events(run.folder) == []
    assert not (run.folder / "nonfinite").exists()


def test_watching_changes_no_weight(tmp_path: Path) -> None:
    watched = SmallRun(tmp_path).fit()
    alone = SmallRun(tmp_path)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=12,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(alone.module, datamodule=alone.data)

    weights = alone.module.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in watched.module.state_dict().items())


def test_nan_at_step_7_is_skipped_counted_and_dumped(tmp_path: Path) -> None:
    run = SmallRun(tmp_path, SAFE, "guards.plant_nan_at_step=7").fit()

    assert [step for step in range(1, 13) if not run.weights.moved(step)] == [7]
    assert run.verdicts["finite_steps"].status == "warning"
    assert run.verdicts["finite_steps"].figures == {"skipped_steps": 1, "steps": 12}
    (event,) = read_events(run.folder)
    assert (event["step"], event["event"], event["loss"]) == (7, "nonfinite", None)
    dump = torch.load(run.folder / event["dump"], weights_only=True)
    assert event["dump"] == "nonfinite/step_7.pt"
    assert math.isnan(dump["loss"])
    assert all(torch.equal(run.weights.after[6][name], value) for name, value in dump["weights"].items())
    assert dump["batches"][0]["input_ids"].shape == (4, 12)


def test_a_skipped_step_leaves_the_optimizer_as_it_was(tmp_path: Path) -> None:
    """Moments poisoned by one NaN would poison every later step."""
    skipped = SmallRun(tmp_path, "guards.plant_nan_at_step=12").fit()
    shorter = SmallRun(tmp_path).fit(max_steps=11)

    states = [run.trainer.optimizers[0].state_dict()["state"] for run in (skipped, shorter)]
    assert states[0].keys() == states[1].keys()
    for key, values in states[0].items():
        assert all(torch.equal(value, states[1][key][name]) for name, value in values.items())


def test_a_run_that_skipped_all_its_steps_has_not_learnt(tmp_path: Path) -> None:
    with pytest.raises(GuardFailure, match=r"each of the run's steps \(1\) had NaN or Inf and was skipped: nothing"):
        SmallRun(tmp_path, "guards.plant_nan_at_step=1").fit(max_steps=1)


def test_a_skipped_step_of_an_optimizer_that_is_not_fused_changes_nothing() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, foreach=False)
    weight.grad = torch.ones(3)
    optimizer.step()
    before = weight.detach().clone()

    weight.grad = torch.full((3,), math.nan)
    skip_if_bad(optimizer, torch.tensor(1.0))
    optimizer.step()

    assert torch.equal(weight, before)
    assert optimizer.state[weight]["step"] == 1


def test_all_batches_of_an_accumulated_step_are_dumped(tmp_path: Path) -> None:
    run = SmallRun(tmp_path, "guards.plant_nan_at_step=3", "trainer.accumulate_batches=2").fit()

    dump = torch.load(run.folder / "nonfinite/step_3.pt", weights_only=True)

    assert len(dump["batches"]) == 2
    assert not run.weights.moved(3)
    assert run.weights.moved(4)


def test_the_lagged_states_of_the_step_are_dumped(tmp_path: Path) -> None:
    run = SmallRun(tmp_path, *FEEDBACK, "guards.plant_nan_at_step=7").fit()

    dump = torch.load(run.folder / "nonfinite/step_7.pt", weights_only=True)

    assert dump["states"][0].shape == (4, 12, 16)
    assert run.module.cache.states.isfinite().all()  # type: ignore[union-attr,operator]


def test_a_gradient_that_overflows_under_a_finite_loss_is_skipped(tmp_path: Path) -> None:
    run = SmallRun(tmp_path, SAFE)

    def overflow(gradient: Tensor) -> Tensor:
        return gradient * math.inf if run.trainer.global_step == 2 else gradient

    run.module.model.head.weight.register_hook(overflow)  # type: ignore[union-attr,operator]
    run.fit()

    (event,) = read_events(run.folder)
    assert (event["step"], event["event"]) == (3, "nonfinite")
    assert event["loss"] > 0
    assert not run.weights.moved(3)


class EveryLossNaN(Callback):
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        loss *= math.nan


def test_a_run_that_stays_nan_is_stopped(tmp_path: Path) -> None:
    run = SmallRun(tmp_path, "guards.max_nonfinite_steps=2")
    start = {name: value.clone() for name, value in run.module.state_dict().items()}

    with pytest.raises(
        GuardFailure, match=r"guards\.finite_steps: 3 steps, the last of them 3, .*guards\.max_nonfinite_steps=2\."
    ):
        run.fit(EveryLossNaN())

    assert run.verdicts["finite_steps"].status == "failed"
    assert all(torch.equal(start[name], value) for name, value in run.module.state_dict().items())
    assert len(list((run.folder / "nonfinite").iterdir())) == 3


def test_a_full_disk_does_not_hide_the_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)

    run = SmallRun(tmp_path, SAFE, "guards.plant_nan_at_step=7").fit()

    (event,) = read_events(run.folder)
    assert event["dump"] == "not written: [Errno 28] No space left on device"
    assert list((run.folder / "nonfinite").iterdir()) == []


def test_targets_that_the_model_can_see_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Blocks.__getitems__

    def unshifted(self: Blocks, sample_ids: Any) -> dict[str, Tensor]:
        batch = cut(self, sample_ids)
        return {**batch, "labels": batch["input_ids"].clone()}

    monkeypatch.setattr(Blocks, "__getitems__", unshifted)
    run = SmallRun(tmp_path, "optimizer.lr=0.02", "trainer.max_steps=200", floor=True)

    with pytest.raises(
        GuardFailure, match=r"guards\.leak: the training loss is .* Look for targets that the model can see"
    ):
        run.fit()

    assert run.verdicts["leak"].status == "failed"
    assert read_events(run.folder)[-1]["event"] == "suspected_leak"
    assert run.trainer.global_step < 200


def test_learning_by_heart_is_allowed_where_it_is_meant(tmp_path: Path) -> None:
    overrides = ("data.max_train_blocks=4", "optimizer.lr=0.02", "trainer.max_steps=150", "guards.leak_steps=0")

    run = SmallRun(tmp_path, *overrides, floor=True).fit()

    assert run.trainer.callback_metrics["train/loss"] < 0.7 * run.data.facts["floor_nats_per_token"]
    assert run.verdicts["leak"].status == "not applicable"


def test_an_accumulated_step_cut_short_by_the_epoch_has_the_mean_loss(tmp_path: Path) -> None:
    """Lightning divides by the batches asked for: the half step at an epoch's end would look like half the loss."""
    overrides = ("trainer.accumulate_batches=4", "optimizer.lr=1e-9", "data.max_train_blocks=20")

    run = SmallRun(tmp_path, *overrides).fit()

    losses = list(run.monitor._spikes.losses)
    assert min(losses) > 0.95 * max(losses)


class OneLargeStep(Callback):
    """Takes one step with a thousand times the learning rate."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step + 1 == self.step:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] *= 1000


def test_states_cut_from_the_loss_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = SmallRun(tmp_path, SAFE)
    encode = run.module.model.encode

    def detached(*given: Any, **options: Any) -> Any:
        output = encode(*given, **options)
        return dataclasses.replace(output, hidden=output.hidden.detach().requires_grad_())

    run.module.model.encode = detached
    run.fit()

    body = {name for name, _ in run.module.named_parameters() if ".layers." in name}
    (event,) = [event for event in read_events(run.folder) if event["event"] == "no_gradient"]
    assert event["step"] == 1
    assert body <= set(event["names"])
    assert 0 < event["share_of_weights"] < 1
    assert any("no_gradient" in message for message in caplog.messages)
    verdict = run.verdicts["gradients"]
    assert verdict.status == "warning"
    assert verdict.message.startswith("guards.gradients: model.")
    assert f"and {len(event['names']) - 5} more had no gradient in any step" in verdict.message


def test_what_is_trained_from_a_later_step_on_is_not_told(tmp_path: Path) -> None:
    class LateGradient(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            if trainer.global_step < 3:
                next(pl_module.parameters()).grad = None

    run = SmallRun(tmp_path, SAFE).fit(LateGradient())

    assert [event["event"] for event in read_events(run.folder)] == ["no_gradient"]
    assert run.verdicts["gradients"].status == "passed"


def test_a_loss_spike_is_logged_with_gradient_and_state_norms(tmp_path: Path) -> None:
    run = SmallRun(tmp_path, *FEEDBACK, "guards.spike_deviations=20", "trainer.max_steps=20").fit(OneLargeStep(11))

    event = read_events(run.folder)[0]

    assert (event["step"], event["event"]) == (12, "loss_spike")
    assert event["loss"] > event["median"] + 1
    assert event["deviations"] > 20
    assert event["gradient_norm"] > 0
    assert event["state_norms"]["hidden states"] > 0
    assert run.verdicts["loss_spikes"].status == "warning"


def test_measuring_a_spike_leaves_the_model_in_training(tmp_path: Path) -> None:
    run = SmallRun(tmp_path, *FEEDBACK, "guards.spike_deviations=20", "trainer.max_steps=14").fit(OneLargeStep(11))

    assert read_events(run.folder)
    assert run.module.model.training


def test_a_validation_gap_above_the_limit_is_a_warning(tmp_path: Path) -> None:
    overrides = (
        "data.max_train_blocks=4",
        "optimizer.lr=0.02",
        "trainer.max_steps=60",
        "trainer.validate_every_steps=60",
    )

    run = SmallRun(tmp_path, SAFE, *overrides, "guards.max_validation_gap=0.5").fit()

    verdict = run.verdicts["validation_gap"]
    assert verdict.status == "warning"
    assert verdict.figures["largest_gap_nats"] > 0.5
    assert [event["event"] for event in read_events(run.folder)] == ["validation_gap"]


def test_a_validation_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    class Poison(Callback):
        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            with torch.no_grad():
                pl_module.model.final_norm.weight[0] = math.nan  # type: ignore[index,union-attr]

    run = SmallRun(tmp_path)

    with pytest.raises(GuardFailure, match=r"guards\.finite_steps: val/loss is nan at step 6\."):
        run.fit(Poison())


def test_a_deployed_function_worse_than_the_trained_one_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = Feedback.forward

    def wrong_when_stepping(self: Feedback, embedded: Tensor, previous: Tensor) -> Tensor:
        return feed(self, embedded, previous) if previous.shape[1] > 1 else -embedded

    monkeypatch.setattr(Feedback, "forward", wrong_when_stepping)

    run = SmallRun(
        tmp_path, *FEEDBACK, "trainer.max_steps=40", "trainer.validate_every_steps=40", "optimizer.lr=0.01"
    ).fit()

    verdict = run.verdicts["deployment_loss"]
    assert verdict.status == "warning"
    assert verdict.figures["val/loss"] > 1.02 * verdict.figures["val/loss_lagged"]
    assert "guards.deployment_loss: the deployed function's loss is" in verdict.message


def test_an_interrupted_run_remembers_what_was_found(tmp_path: Path) -> None:
    overrides = ("guards.plant_nan_at_step=2", "guards.spike_window=4", "guards.spike_deviations=20")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    straight = SmallRun(tmp_path / "a", *overrides).fit(OneLargeStep(5))
    first = SmallRun(tmp_path / "b", *overrides).fit(
        OneLargeStep(5), StopAtStep(6), Checkpoints(tmp_path / "checkpoints", every_steps=6)
    )
    write_event(first.folder, {"step": 9, "event": "of a step that is made again"})

    second = SmallRun(tmp_path / "b", *overrides).fit(resume=tmp_path / "checkpoints/last.ckpt")

    assert first.trainer.global_step == 6
    assert second.verdicts["finite_steps"] == straight.verdicts["finite_steps"]
    assert second.verdicts["loss_spikes"] == straight.verdicts["loss_spikes"]
    assert second.verdicts["loss_spikes"].figures["spikes"] > 0
    assert read_events(second.folder) == read_events(straight.folder)


def test_events_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_event(tmp_path, {"step": step, "event": "loss_spike", "loss": math.inf, "state_norms": {"a": math.nan}})

    keep_events(tmp_path, up_to_step=2)

    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert json.loads(lines[0])["state_norms"] == {"a": None}


class ScaledLosses(MixedPrecision):
    """What fp16 does to losses, with the arithmetic of fp32."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**16))

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        yield


class NormsOfSteps(Callback):
    def __init__(self) -> None:
        self.found: list[Tensor | None] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.found.append(pl_module.last_grad_norm)  # type: ignore[arg-type]


def test_scaled_losses_make_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients were clipped and their norm was logged before their scale was taken off."""
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda self: pytest.fail("the step waits for the device"))
    norms, scaled_norms = NormsOfSteps(), NormsOfSteps()
    overrides = (
        SAFE,
        "trainer.max_steps=3",
        "trainer.validate_every_steps=3",
        "trainer.gradient_clip_norm=0.5",
        "trainer.accumulate_batches=2",
    )

    plain = SmallRun(tmp_path, *overrides).fit(norms)
    scaled = SmallRun(tmp_path, *overrides).fit(scaled_norms, plugins=ScaledLosses())

    # A power of two changes no digit.
    assert scaled_norms.found == norms.found
    assert list(scaled.monitor._spikes.losses) == list(plain.monitor._spikes.losses)
    weights = plain.module.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in scaled.module.state_dict().items())


@pytest.mark.gpu
def test_nan_on_the_gpu_is_skipped_without_waiting_and_read_one_step_later(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    run = SmallRun(tmp_path, SAFE, "guards.plant_nan_at_step=7")
    waiting: list[int] = []

    class NoWaiting(Callback):
        """Errors on a synchronising call between backward and the optimizer's step."""

        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            torch.cuda.set_sync_debug_mode("error" if run.trainer.global_step > 0 else 0)

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode(0)
            waiting.append(len(run.monitor._waiting))

    run.fit(NoWaiting(), accelerator="gpu")

    assert [step for step in range(1, 13) if not run.weights.moved(step)] == [7]
    assert run.verdicts["finite_steps"].figures == {"skipped_steps": 1, "steps": 12}
    assert waiting[1] == 2  # the step that has just ended, and the one before it that is read now
