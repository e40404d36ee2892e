"""What a run watches for while it trains: NaN, spikes, leaks, over-fitting, and a deployed function worse than the trained one."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from newllm.arrivals import to_host
from newllm.callbacks.loop import loss_scaler
from newllm.config.schema import GuardsConfig
from newllm.guards.detectors import SpikeDetector, suspected_leak
from newllm.guards.events import dump, keep_events, write_event
from newllm.guards.probe import PROBE_TOKENS, ROWS, untouched
from newllm.guards.step import Step, measure, on_host, skip_if_bad
from newllm.guards.verdict import GuardFailure, Verdict
from newllm.models.base import LanguageModel
from newllm.state import tensors_of

log = logging.getLogger(__name__)

# Share of the loss; both losses are of the same text and weights, so no noise of sampling stands between them.
DEPLOYMENT_TOLERANCE = 0.02
# Noise of single batches passes the threshold now and then: every spike is logged, these are worth a warning.
SPIKES_BY_CHANCE = 0.01  # share of steps
FAR_SPIKE = 3  # times the threshold
NAMED = 5  # parameters in a message


@dataclass
class _Counts:
    """What a resumed run must still know."""

    spikes: int = 0
    largest_spike: float = 0.0  # robust deviations
    skipped: int = 0
    steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    largest_gap: float | None = None
    without_gradient: list[str] | None = None  # parameters that no step has reached so far; None before the first


class Monitor(Callback):
    """Watches every optimizer step; raises GuardFailure where the run cannot give a number any more.

    A step with NaN or Inf in its loss or gradients changes no weight: the fused optimizer is told on the device, so that
    nothing waits for it, and what happened is read one step later (at once on a CPU). Its batches, the states they started
    from (the module's `step_state`, if it has one) and the weights go to nonfinite/step_N.pt.

    Put it behind the telemetry, which shows what it logs, and before checkpoints, which must not save what it stops.

    Args:
        guards: thresholds.
        folder: run folder: events.jsonl and dumps.
        floor_nats: entropy of the training text given the token before, nats per token; None where there is no text, or the
            weights are not random.
    """

    def __init__(self, guards: GuardsConfig, folder: str | Path, *, floor_nats: float | None) -> None:
        self.guards, self.folder, self.floor_nats = guards, Path(folder), floor_nats
        self._spikes = SpikeDetector(guards.spike_window, guards.spike_deviations)
        self._counts = _Counts()
        self._first_losses: list[float] = []
        self._losses: list[Tensor] = []  # of the batches accumulated so far
        self._batches: list[Any] = []
        self._states: list[Any] = []
        self._waiting: list[Step] = []
        self._failure: Verdict | None = None

    def verdicts(self) -> list[Verdict]:
        """Return what was found so far."""
        found = [self._finite(), self._spike(), self._leak(), self._gap(), self._deployment(), self._gradients()]
        return [self._failure if self._failure and self._failure.name == v.name else v for v in found]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            keep_events(self.folder, up_to_step=trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batches.append(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if trainer.global_step + 1 == self.guards.plant_nan_at_step:
            loss *= math.nan  # in place: this very loss is differentiated next
        self._losses.append(loss.detach())
        self._states.append(getattr(pl_module, "step_state", None))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._look_for_gradients(trainer, pl_module, optimizer)
        figures = measure(trainer, optimizer, self._losses)
        if loss_scaler(trainer) is None:
            skip_if_bad(optimizer, figures[2])
        self._waiting.append(Step(trainer.global_step + 1, to_host(figures), self._batches, self._states))
        self._losses, self._batches, self._states = [], [], []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._settle(trainer, pl_module, keep=1 if pl_module.device.type == "cuda" else 0)
        self._stop_if_failed()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._settle(trainer, pl_module)
        metrics = {
            name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/loss")
        }
        self._counts.metrics = metrics
        self._judge_validation(trainer, metrics.get("val/loss"))
        self._stop_if_failed()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle(trainer, pl_module)
        for optimizer in trainer.optimizers:
            vars(optimizer).pop("found_inf", None)
        skipped = self._counts.skipped
        if 0 < skipped == self._counts.steps and trainer.global_step == trainer.max_steps:
            self._fail(
                "finite_steps",
                f"guards.finite_steps: each of the run's steps ({skipped}) had NaN or Inf and was skipped: nothing was learnt. "
                "Allowed: some that were not. Lower optimizer.lr, or look at what is dumped in nonfinite/ of the run folder.",
                {"skipped_steps": skipped, "step": trainer.global_step},
            )
        self._stop_if_failed()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._settle(trainer, pl_module)
        checkpoint["monitor"] = {
            "counts": dict(vars(self._counts)),
            "losses": list(self._spikes.losses),
            "first_losses": list(self._first_losses),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit" and "monitor" in checkpoint:
            saved = checkpoint["monitor"]
            self._counts = _Counts(**saved["counts"])
            self._spikes.restore(saved["losses"])
            self._first_losses = list(saved["first_losses"])

    def _look_for_gradients(self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Keep the names of what is to be trained and has had no gradient in any step."""
        before = self._counts.without_gradient
        if before == []:
            return
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        asked = {
            name: p for name, p in module.named_parameters() if id(p) in trained and (not before or name in before)
        }
        missing = [name for name, parameter in asked.items() if parameter.grad is None]
        self._counts.without_gradient = missing
        if before is None and missing:
            share = sum(asked[name].numel() for name in missing) / sum(p.numel() for p in asked.values())
            figures = {"parameters": len(missing), "share_of_weights": share, "names": missing}
            self._report(trainer, trainer.global_step + 1, "no_gradient", figures)

    def _settle(self, trainer: Trainer, module: LightningModule, *, keep: int = 0) -> None:
        """Judge the steps whose figures wait, all but the last `keep`."""
        while len(self._waiting) > keep:
            step = self._waiting.pop(0)
            loss, norm, is_bad = step.read()
            self._counts.steps += 1
            if is_bad:
                self._record_skipped(trainer, module, step, loss, norm)
            elif math.isfinite(loss):
                self._judge_loss(trainer, module, step, loss, norm)

    def _record_skipped(self, trainer: Trainer, module: LightningModule, step: Step, loss: float, norm: float) -> None:
        self._counts.skipped += 1
        content = {
            "step": step.number,
            "loss": loss,
            "gradient_norm": norm,
            "batches": [on_host(batch) for batch in step.batches],
            "states": [on_host(state) for state in step.states],
            "weights": on_host(module.state_dict()),
        }
        where = dump(self.folder, step.number, content, rank=trainer.global_rank)
        figures = {"loss": loss, "gradient_norm": norm, "skipped_steps": self._counts.skipped, "dump": where}
        self._report(trainer, step.number, "nonfinite", figures)
        limit = self.guards.max_nonfinite_steps
        if self._counts.skipped > limit:
            self._fail(
                "finite_steps",
                f"guards.finite_steps: {self._counts.skipped} steps, the last of them {step.number}, had NaN or Inf in loss or "
                f"gradients. Allowed: at most guards.max_nonfinite_steps={limit}. "
                f"Lower optimizer.lr, or look at the batch and weights in {where}.",
                {"skipped_steps": self._counts.skipped, "step": step.number},
            )

    def _judge_loss(self, trainer: Trainer, module: LightningModule, step: Step, loss: float, norm: float) -> None:
        spike = self._spikes.observe(loss)
        if spike is not None:
            self._counts.spikes += 1
            self._counts.largest_spike = max(self._counts.largest_spike, spike.deviations)
            figures = {"loss": loss, "median": spike.median, "deviations": spike.deviations, "gradient_norm": norm}
            norms = state_norms(module.model, step.batches[-1]["input_ids"])  # type: ignore[arg-type]
            self._report(trainer, step.number, "loss_spike", {**figures, "state_norms": norms})
        if step.number > self.guards.leak_steps or self.floor_nats is None:
            return
        self._first_losses.append(loss)
        reached = suspected_leak(self._first_losses, self.floor_nats)
        if reached is not None:
            figures = {"loss": reached, "floor_nats": self.floor_nats, "step": step.number}
            self._report(trainer, step.number, "suspected_leak", figures)
            self._fail(
                "leak",
                f"guards.leak: the training loss is {reached:.3f} nats at step {step.number}, pairs of tokens alone tell down to "
                f"{self.floor_nats:.3f}. Allowed: no loss far below that in the first guards.leak_steps={self.guards.leak_steps} "
                "steps. Look for targets that the model can see; if the text is meant to be learned by heart, set guards.leak_steps=0.",
                figures,
            )

    def _judge_validation(self, trainer: Trainer, loss: float | None) -> None:
        if loss is None:
            return
        if not math.isfinite(loss):
            self._report(trainer, trainer.global_step, "nonfinite_validation", {"val/loss": loss})
            self._fail(
                "finite_steps",
                f"guards.finite_steps: val/loss is {loss} at step {trainer.global_step}. Allowed: finite numbers. "
                "Look at the weights of the last checkpoint and at divisions by sums that can be 0.",
                {"skipped_steps": self._counts.skipped, "step": trainer.global_step},
            )
        elif self._spikes.losses:
            gap = loss - self._spikes.middle
            known = self._counts.largest_gap
            self._counts.largest_gap = gap if known is None else max(gap, known)
            if self.guards.max_validation_gap is not None and gap > self.guards.max_validation_gap:
                figures = {"gap_nats": gap, "val/loss": loss, "train/loss": self._spikes.middle}
                self._report(trainer, trainer.global_step, "validation_gap", figures)

    def _report(self, trainer: Trainer, step: int, event: str, figures: dict[str, Any]) -> None:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if isinstance(value, float | int))
        log.warning("step %d: %s (%s)", step, event, shown)
        if trainer.is_global_zero:
            write_event(self.folder, {"step": step, "event": event, **figures})

    def _fail(self, name: str, message: str, figures: dict[str, Any]) -> None:
        self._failure = self._failure or Verdict(name, "failed", message, figures)

    def _stop_if_failed(self) -> None:
        if self._failure is not None:
            raise GuardFailure([self._failure])

    def _finite(self) -> Verdict:
        skipped, steps = self._counts.skipped, self._counts.steps
        figures = {"skipped_steps": skipped, "steps": steps}
        if skipped == 0:
            return Verdict("finite_steps", "passed", f"All {steps} optimizer steps were finite.", figures)
        message = (
            f"{skipped} of {steps} optimizer steps had NaN or Inf and were skipped; see nonfinite/ in the run folder."
        )
        return Verdict("finite_steps", "warning", message, figures)

    def _spike(self) -> Verdict:
        spikes, steps, largest = self._counts.spikes, self._counts.steps, self._counts.largest_spike
        limit = self.guards.spike_deviations
        message = f"{spikes} of {steps} losses were more than {limit} robust deviations above the median, the farthest {largest:.1f}."
        is_chance = spikes <= SPIKES_BY_CHANCE * steps and largest <= FAR_SPIKE * limit
        figures = {"spikes": spikes, "steps": steps, "largest_deviations": largest}
        return Verdict("loss_spikes", "passed" if is_chance else "warning", message, figures)

    def _leak(self) -> Verdict:
        if self.floor_nats is None or self.guards.leak_steps == 0:
            return Verdict("leak", "not applicable", "No loss is known that a fresh model cannot reach.")
        figures = {"floor_nats": self.floor_nats, "steps": len(self._first_losses)}
        return Verdict("leak", "passed", "No early loss was below what pairs of tokens tell.", figures)

    def _gap(self) -> Verdict:
        gap, limit = self._counts.largest_gap, self.guards.max_validation_gap
        if gap is None:
            return Verdict("validation_gap", "not applicable", "There was no validation.")
        figures = {"largest_gap_nats": gap, "max_validation_gap_nats": limit}
        said = f"val/loss was at most {gap:.3f} nats above the training loss"
        if limit is None or gap <= limit:
            return Verdict("validation_gap", "passed", f"{said}.", figures)
        message = f"guards.validation_gap: {said}. Allowed: guards.max_validation_gap={limit}. Train shorter, or on more text."
        return Verdict("validation_gap", "warning", message, figures)

    def _gradients(self) -> Verdict:
        missing = self._counts.without_gradient
        if missing is None:
            return Verdict("gradients", "not applicable", "No step was made.")
        if not missing:
            return Verdict("gradients", "passed", "All that is trained had a gradient.")
        first, rest = ", ".join(missing[:NAMED]), len(missing) - NAMED
        what = f"{first} and {rest} more" if rest > 0 else first
        message = (
            f"guards.gradients: {what} had no gradient in any step and are as they were. Allowed: gradients for all "
            "that the optimizer is given. Look for a detach() between them and the loss; switch off what is not to be trained "
            "with requires_grad_(False)."
        )
        return Verdict("gradients", "warning", message, {"names": missing})

    def _deployment(self) -> Verdict:
        deployed, trained = (self._counts.metrics.get(name) for name in ("val/loss", "val/loss_lagged"))
        if deployed is None or trained is None:
            return Verdict("deployment_loss", "not applicable", "The training procedure is the deployed function.")
        figures = {"val/loss": deployed, "val/loss_lagged": trained}
        said = f"the deployed function's loss is {deployed:.4f} nats, the training procedure's {trained:.4f}"
        if deployed <= (1 + DEPLOYMENT_TOLERANCE) * trained:
            return Verdict("deployment_loss", "passed", f"{said[0].upper()}{said[1:]}.", figures)
        message = (
            f"guards.deployment_loss: {said}. Allowed: at most {DEPLOYMENT_TOLERANCE:.0%} more. "
            "Raise trainer.sweeps or lower optimizer.lr: the lagged states are far from the exact ones."
        )
        return Verdict("deployment_loss", "warning", message, figures)


def state_norms(model: LanguageModel, input_ids: Tensor) -> dict[str, float]:
    """Return the L2 norm of every part of the state after the first tokens of a batch, and of the hidden states."""
    with untouched(model):
        output = model(input_ids[:ROWS, :PROBE_TOKENS])
        parts = {name: part for name, part in tensors_of(output.state).items() if part.is_floating_point()}
        return {name: part.norm().item() for name, part in {**parts, "hidden states": output.hidden}.items()}
