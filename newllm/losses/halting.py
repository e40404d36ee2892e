"""Learned halting: the cross entropy of all steps of a token, weighed by the chance that the gate halts there.

s: most steps per token. q_{t,j}: share of step j at token t; the shares of a token sum to 1, so no token can be dodged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from newllm.config.fields import Range
from newllm.config.schema import LossConfig
from newllm.losses.next_token import mean_over_targets, token_nats
from newllm.models.selective import SelectiveLM


@dataclass(frozen=True, kw_only=True)
class HaltingConfig(LossConfig):
    """Mean nats per target token over the steps' shares, and a price for shares far from a geometric distribution.

    Attributes:
        prior: p of the geometric distribution: the chance to halt at a step once it is reached; 1/p steps in the mean.
        kl_weight: beta, weight of the divergence from it, nats per nat.
    """

    reads: ClassVar[str] = "steps"

    prior: Annotated[float, Range(above=0, below=1)]
    kl_weight: Annotated[float, Range(minimum=0)]

    def check(self, config: Any) -> list[str]:
        """Return what is wrong between the loss and the model."""
        halting = getattr(config.model, "halting", "fixed")
        if halting == "learned":
            return []
        return [
            f"loss=halting: weighs steps by a gate, model={config.model.kind} has none. "
            "Allowed with halting: model=selective model.halting=learned. Choose these or another loss."
        ]


def halting_log_shares(gate_logits: Tensor) -> Tensor:
    """Return log q [..., s] for gates g before the sigmoid [..., s-1]: q_j = g_j * prod_{i<j} (1 - g_i), the rest at the last.

    Source: PonderNet (Banino et al., 2021), eq. 5 and the remainder rule of its section 2.3.
    """
    halts = nn.functional.logsigmoid(gate_logits)
    goes_on = nn.functional.logsigmoid(-gate_logits).cumsum(dim=-1)
    reached = nn.functional.pad(goes_on, (1, 0))  # chance to reach each step, in logs
    return torch.cat([halts + reached[..., :-1], reached[..., -1:]], dim=-1)


def geometric_log_shares(num_steps: int, prior: float) -> Tensor:
    """Return log shares [s] of the geometric distribution whose remainder halts at the last step."""
    gate = torch.tensor(math.log(prior) - math.log1p(-prior), dtype=torch.float64)
    return halting_log_shares(gate.expand(num_steps - 1))


class HaltingLoss(nn.Module):
    """Sum over steps of q * cross entropy, and beta * KL(q || Geometric(p)), mean over targets.

    Args:
        config: the prior and its weight.
    """

    def __init__(self, config: HaltingConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, model: SelectiveLM, levels_BTsD: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, a scalar with gradient.

        Args:
            model: gives logits and gates of the states.
            levels_BTsD: hidden state of every step.
            targets: the token after each position [B, T], as the batch holds them: nothing is shifted here.
        """
        log_shares = halting_log_shares(model.halting_logits(levels_BTsD))
        shares = log_shares.exp()
        prior = geometric_log_shares(model.skip_interval, self.config.prior).to(shares)
        divergence = (shares * (log_shares - prior)).sum(dim=-1)
        nats = (shares * step_nats(model, levels_BTsD, targets)).sum(dim=-1)
        return mean_over_targets(nats + self.config.kl_weight * divergence, targets)

    @torch.no_grad()
    def statistics(self, model: SelectiveLM, levels_BTsD: Tensor, targets: Tensor) -> dict[str, float]:
        """Return what the gate does: its spread, the mean steps, and how it goes with the uncertainty of the step.

        The correlation is not built in: the gate is trained on the loss, not on the entropy.
        """
        logits = model.halting_logits(levels_BTsD)
        gates = logits.sigmoid()
        entropies = torch.distributions.Categorical(logits=model.logits(levels_BTsD[:, :, :-1])).entropy()
        together = torch.stack([gates.flatten(), entropies.flatten()])
        shares = halting_log_shares(logits).exp().mean(dim=(0, 1))
        steps = model.emitting_step(levels_BTsD, model.halting_threshold) + 1
        return {
            "halting/gate_mean": gates.mean().item(),
            "halting/gate_std": gates.std().item(),
            "halting/gate_min": gates.min().item(),
            "halting/gate_max": gates.max().item(),
            "halting/gate_entropy_correlation": torch.corrcoef(together)[0, 1].nan_to_num(0).item(),
            "halting/mean_steps": steps.double().mean().item(),
            "halting/mean_steps_weighted": sum((j + 1) * share for j, share in enumerate(shares.tolist())),
        }


def step_nats(model: SelectiveLM, levels_BTsD: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of every step [B, T, s], nats: each predicts the token after its own."""
    return token_nats(model, levels_BTsD, targets.unsqueeze(-1).expand(levels_BTsD.shape[:3]))


def build(config: HaltingConfig) -> HaltingLoss:
    """Return the loss that a configuration describes."""
    return HaltingLoss(config)
