"""The figures of one optimizer step: measured on the device, read on the host when they have arrived, acted on without waiting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from newllm.arrivals import OnTheWay
from newllm.callbacks.loop import loss_scaler
from newllm.state import State, tensors_of


@dataclass
class Step:
    """One optimizer step whose figures may still be on their way from the device.

    Attributes:
        number: optimizer steps made, this one included.
        figures: mean loss in nats, L2 norm of all gradients, 1 if any rank has NaN or Inf: [3].
        batches: the batches it was made from, one per accumulation.
        states: what each started from, as far as the module says.
    """

    number: int
    figures: OnTheWay
    batches: list[Any]
    states: list[Any]

    def read(self) -> tuple[float, float, bool]:
        """Return the mean loss, the gradient norm and whether the step was skipped; waits until they are known."""
        loss, norm, is_bad = self.figures.wait().tolist()
        return loss, norm, bool(is_bad)


def measure(trainer: Trainer, optimizer: torch.optim.Optimizer, losses: list[Tensor]) -> Tensor:
    """Return mean loss, gradient norm and whether any rank has NaN or Inf, [3], on the device, without waiting for it.

    Args:
        trainer: knows accumulation, precision and ranks.
        optimizer: its parameters hold the gradients.
        losses: as they were differentiated, one per accumulated batch.
    """
    # Lightning has divided each loss by the number it accumulates, which the last step of an epoch may fall short of.
    factor = getattr(trainer.lightning_module, "loss_factor", None)
    factor = trainer.accumulate_grad_batches / len(losses) if factor is None else factor
    loss = torch.stack(losses).float().sum() * factor
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).float().to(loss.device)
    is_finite = torch.isfinite(loss)
    scaler = loss_scaler(trainer)
    if scaler is None:
        is_finite = is_finite & torch.isfinite(norm)
    else:
        loss = loss / scaler.scale(torch.ones_like(loss))  # `get_scale` waits for the device
    figures = torch.stack([loss, norm, (~is_finite).float()])
    if trainer.world_size > 1:  # all ranks must judge alike; after the backward pass they have the same gradients
        torch.distributed.all_reduce(figures)
        figures = figures / figures.new_tensor([trainer.world_size, trainer.world_size, 1])
    return figures


def skip_if_bad(optimizer: torch.optim.Optimizer, is_bad: Tensor) -> None:
    """Make the optimizer's next step change nothing if `is_bad` is above 0."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        # Fused optimizers read this on the device: neither weights, nor moments, nor their step counts move.
        optimizer.found_inf = (is_bad > 0).float()  # type: ignore[attr-defined]
    elif is_bad.item() > 0:
        optimizer.zero_grad(set_to_none=True)  # parameters without gradient are left alone


def on_host(value: Any) -> Any:
    """Return plain containers of host tensors: what weights_only loading accepts."""
    if isinstance(value, State):
        value = tensors_of(value)
    if isinstance(value, dict):
        return {name: on_host(part) for name, part in value.items()}
    return value.detach().cpu() if isinstance(value, Tensor) else value
