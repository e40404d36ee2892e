"""What all training procedures share: loss, optimizer, exact validation, logged names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import lightning
import torch
from torch import Tensor, nn

from newllm import ranks
from newllm.callbacks.loop import has_stepped, loss_scaler
from newllm.config.schema import TrainConfig
from newllm.evaluation.scoring import Mode, Score, score_batch
from newllm.layers.telemetry import memory_telemetry
from newllm.losses.next_token import NO_TARGET
from newllm.models.base import LanguageModel
from newllm.state import State
from newllm.trainers.optimization import build_optimizer, learning_rate_factor
from newllm.trainers.validation_sums import BatchSums

Batch = dict[str, Tensor]
MEMORY_PROBE_ROWS = 4  # of a batch, of which the use of the memories is measured


def context_norms(model: LanguageModel, states: Tensor) -> dict[str, Tensor]:
    """Return mean, deviation and largest of the contexts' L2 norms over all positions; empty for a model without a context.

    Args:
        model: its states begin with the context where it has one.
        states: of a batch [B, T, D].
    """
    width = getattr(model, "context_dim", None)
    if width is None:
        return {}
    norms = torch.linalg.vector_norm(states[..., :width], dim=-1)
    return {"context/norm_mean": norms.mean(), "context/norm_std": norms.std(), "context/norm_max": norms.max()}


class StepMean:
    """Makes the loss of an optimizer step the mean over all its targets, whichever ranks and batches they are in.

    Ranks may hold different numbers of rows and targets, batches of one step too, and the last step of an epoch may be made
    from fewer batches. One rank and one batch leave the loss as it was.

    Args:
        num_batches: whose gradients make a step; its loss is divided by so many before each backward pass.
        full_batch: targets of a batch of all ranks when none is missing.
    """

    def __init__(self, num_batches: int, full_batch: int) -> None:
        self.num_batches, self.full_batch = num_batches, full_batch
        self._weights: list[Tensor] = []  # share of a full batch's targets, of each batch so far
        self._losses: list[Tensor] = []  # mean over the batch's targets times its weight

    def weigh(self, loss: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss to differentiate and the mean over the targets of the step so far, both scalars.

        Args:
            loss: mean over the targets of this rank's part of a batch.
            labels: of that part [B, T].
        """
        if ranks.world_size() == 1 and self.num_batches == 1:
            return loss, loss.detach()
        own = (labels != NO_TARGET).sum()
        every = ranks.summed(own).clamp_min(1)  # without a target the loss is 0
        loss = loss * (own * ranks.world_size() / every).to(loss.dtype)
        mean = ranks.summed(loss.detach()) / ranks.world_size()
        if self.num_batches == 1:
            return loss, mean
        weight = every / self.full_batch
        self._weights.append(weight)
        self._losses.append(mean * weight)
        return loss * weight.to(loss.dtype), sum(self._losses) / sum(self._weights)  # type: ignore[return-value]

    def close(self) -> Tensor | None:
        """Return what the gradients of a step whose batches have all been differentiated must be multiplied by; None for 1."""
        if not self._weights:
            return None
        factor = self.num_batches / torch.stack(self._weights).sum()
        self._weights, self._losses = [], []
        return factor


class TrainingModule(lightning.LightningModule):
    """A training procedure over a plain model. A subclass writes `states`: how the hidden states of a batch come about.

    Validation scores the function that is deployed: the exact recurrence, every target once.

    Args:
        model: the model to train.
        loss: callable (model, hidden, targets) -> scalar.
        config: the whole configuration.
        token_bytes: UTF-8 bytes of every token [V], for bits per byte.

    Attributes:
        monitor: validation metric whose lowest value makes the best checkpoint; None where the newest weights are it.
        predicts_tokens: training minimises nats per token; False where its loss is something else and no token is predicted yet.
        loss_factor: of the losses of the last step's batches as they were differentiated, their sum times this is the step's
            mean; None where they weigh alike.
        step_state: what the last step started from, where that was not zeros: for the record of a step that went wrong.
        stop_reason: why the procedure ended its own training, in words; None while it has not.
        histograms: values whose distribution is worth a picture, by name; the telemetry shows them with its next line.
    """

    monitor: ClassVar[str | None] = "val/loss"
    predicts_tokens: ClassVar[bool] = True

    def __init__(self, model: LanguageModel, loss: nn.Module, config: TrainConfig, token_bytes: Tensor) -> None:
        super().__init__()
        self.model, self.loss, self.config = model, loss, config
        self.token_bytes = token_bytes
        self.last_grad_norm: Tensor | None = None
        self.sums = BatchSums()
        self.step_mean = StepMean(config.trainer.accumulate_batches, config.data.batch_size * config.data.block_length)
        self.loss_factor: Tensor | None = None
        self.step_state: Tensor | State | None = None
        self.stop_reason: str | None = None
        self.histograms: dict[str, Tensor] = {}

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the whole run, at most."""
        return self.config.trainer.max_steps

    @property
    def accumulate_batches(self) -> int:
        """Batches whose gradients make one optimizer step."""
        return self.config.trainer.accumulate_batches

    def first_run(self) -> TrainConfig | None:
        """Return the configuration of a run that must be made first, for its folder to be taken over; None where there is none."""
        return None

    def take(self, folder: Path) -> None:
        """Take over what the run that was made first came to.

        Args:
            folder: of that run, finished.
        """
        raise NotImplementedError(f"{type(self).__name__} builds on no other run")

    def facts(self) -> dict[str, Any]:
        """Return what run.json records of the procedure itself, in plain values."""
        return {}

    @classmethod
    def training_flops_per_token(cls, model: LanguageModel, config: TrainConfig) -> float | None:
        """Return the matrix FLOPs per token of a step, forward and backward; None where that is not known before.

        Args:
            model: may be on the meta device.
            config: the whole configuration.
        """
        return model.training_flops_per_token(config.data.block_length) if cls.predicts_tokens else None

    @classmethod
    def positions_per_step(cls, config: TrainConfig, num_positions: int) -> int | None:
        """Return how many positions of a training text that has so many an optimizer step reads; None where the run decides it."""
        return config.data.batch_size * config.trainer.accumulate_batches * config.data.block_length

    @classmethod
    def kept_values(cls, model: LanguageModel) -> int:
        """Return how many context values this procedure keeps of every position of the training text."""
        return 0

    def states(self, batch: Batch) -> Tensor:
        """Return the hidden states [B, T, D] that this procedure trains on, with gradient."""
        raise NotImplementedError(f"{type(self).__name__} has no states(batch): write how they come about")

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        states = self.states(batch)
        loss, mean = self.step_mean.weigh(self.loss(self.model, states, batch["labels"]), batch["labels"])
        measured = {"train/loss": mean, **context_norms(self.model, states.detach())}
        self.log_dict(measured, batch_size=batch["input_ids"].shape[0])
        return loss

    def on_after_backward(self) -> None:
        if not has_stepped(self.trainer):
            return
        self.loss_factor = self.step_mean.close()
        if self.loss_factor is not None:
            gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            torch._foreach_mul_(gradients, self.loss_factor)
        scaler = loss_scaler(self.trainer)
        if scaler is not None:
            # Lightning leaves it to the fused optimizer, which comes after the clipping and the norm that is logged.
            scaler.unscale_(self.trainer.optimizers[0])

    def state_before(self, batch: Batch) -> Any:
        """Return the state that the next step on this batch starts from; None for the empty one."""
        return None

    def probe(self, batch: Batch) -> dict[str, float]:
        """Return what is worth knowing every so often of the states that the next step on this batch starts from."""
        gates = [parameter for name, parameter in self.model.named_parameters() if name.endswith("memory_gate")]
        # A recurrence runs token by token: one row tells enough.
        rows = list(range(1 if self.model.has_feedback else len(batch["input_ids"])))[:MEMORY_PROBE_ROWS]
        state = self.state_before(batch)
        known = None if state is None else state.select(rows)
        measured = memory_telemetry(self.model, batch["input_ids"][rows], known)
        measured["memory/state_bytes"] = float(self.model.state_bytes(batch["input_ids"].shape[1]))
        if gates:
            # The weight where a memory holds something: these rows' memories may still be empty.
            measured["memory/gate_mean"] = (
                torch.cat([gate.detach().sigmoid().flatten() for gate in gates]).mean().item()
            )
        return measured

    def on_validation_epoch_start(self) -> None:
        self.sums = BatchSums()

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        for mode in self.validation_modes():
            score = score_batch(self.model, batch, self.token_bytes, mode=mode)
            self.sums.add(batch, batch_index, {mode: score})

    def validation_modes(self) -> list[Mode]:
        """Return what validation scores: the deployed function, and what stands beside it."""
        return ["exact", "lagged", "no_feedback"] if self.model.has_feedback else ["exact"]

    def on_validation_epoch_end(self) -> None:
        sums = self.sums.total()
        found = self.validation_metrics({name: value for name, value in sums.items() if isinstance(value, Score)})
        # float64: evaluate.py gives the same numbers to the last digit.
        self.log_dict({name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()})

    def validation_metrics(self, scores: dict[str, Score]) -> dict[str, float]:
        """Return what is logged of a validation, by name.

        Args:
            scores: `exact` of the deployed function, the others by what they score.
        """
        found = {f"val/{name}": value for name, value in scores["exact"].metrics().items()}
        return found | {
            f"val/loss_{mode}": score.metrics()["loss"] for mode, score in scores.items() if mode != "exact"
        }

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.config.optimizer)
        # The length of the schedule comes from the configuration: asking the trainer for it would break exact resumption.
        factor = learning_rate_factor(self.config.schedule, self.max_steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        limit = self.config.trainer.gradient_clip_norm
        sharded = getattr(self.trainer.strategy.model, "clip_grad_norm_", None)
        if sharded is not None:  # FSDP: a rank holds a part of each gradient
            self.last_grad_norm = sharded(float("inf") if limit is None else limit)
            return
        gradients = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        # An infinite limit measures the norm and leaves the gradients alone.
        self.last_grad_norm = nn.utils.clip_grad_norm_(gradients, float("inf") if limit is None else limit)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_state"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        torch.set_rng_state(checkpoint["random_state"].cpu())
