"""The small piece of a run's own text that the guards read with the run's own model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from newllm.models.base import LanguageModel, ModelOutput
from newllm.state import tensors_of

ROWS = 2
PROBE_TOKENS = 40  # per row; the exact recurrence reads them one by one
# Read before the probe, doubled until every memory holds something. 8 short of 128 (and the doubles short of its doubles):
# a segment of any power of two up to 1024 is then open, and closes within the probe.
READ_FIRST = 120
READ_AT_MOST = 8 * READ_FIRST


@dataclass(frozen=True)
class Probe:
    """A model that has read something, and two texts to go on with.

    Attributes:
        model: the run's own model.
        parameters: its parameters, those that are all zeros replaced by small random ones: what starts at zero hides faults
            behind it.
        block_ids: the first rows of the batch, whole blocks [1 or 2, length of a block].
        first_ids: what was read before [2, F].
        input_ids: the text to read now [2, T].
        other_ids: another text that differs from it at every position [2, T].
        state: state after `first_ids`.
    """

    model: LanguageModel
    parameters: dict[str, Tensor]
    block_ids: Tensor
    first_ids: Tensor
    input_ids: Tensor
    other_ids: Tensor
    state: Any

    def run(self, input_ids: Tensor, state: Any = None, *, previous_hidden: Tensor | None = None) -> ModelOutput:
        """Return what the model makes of a text, exactly or, given previous states, in one sweep; from `state` unless told."""
        state = self.state if state is None else state
        keywords = {"previous_hidden": previous_hidden}
        return torch.func.functional_call(self.model, self.parameters, (input_ids, state), keywords)

    def logits(self, input_ids: Tensor, *, previous_hidden: Tensor | None = None) -> Tensor:
        """Return the scores of `run` from the probe's state, [2, T, V]."""
        logits = self.run(input_ids, previous_hidden=previous_hidden).logits
        assert logits is not None, "a model called whole gives logits"
        return logits

    def read(self, input_ids: Tensor) -> Any:
        """Return the state after a text that begins with an empty state, in one parallel pass."""
        return _read(self.model, self.parameters, input_ids)


def build_probe(model: LanguageModel, input_ids: Tensor, generator: torch.Generator) -> Probe:
    """Return a probe made from a batch's tokens, whatever their number; they are repeated where they do not suffice.

    It is shorter where a model has few positions.

    Args:
        model: the run's own model.
        input_ids: tokens of a batch [B, T].
        generator: decides the other text and the values in place of zeros; on the CPU.
    """
    device = next(model.parameters()).device
    tokens = input_ids.flatten().to(device)
    most = PROBE_TOKENS + READ_AT_MOST
    longest = min(most, model.max_positions or most)
    num_tokens = min(PROBE_TOKENS, longest // 2)
    needed = ROWS * longest
    tokens = tokens.repeat(-(-needed // len(tokens)))[:needed].view(ROWS, -1)
    text, before = tokens[:, :num_tokens], tokens[:, num_tokens:]
    parameters = {name: _woken(parameter, generator) for name, parameter in model.named_parameters()}
    length = min(READ_FIRST, before.shape[1])
    while _has_empty_part(state := _read(model, parameters, before[:, :length])) and length < before.shape[1]:
        length = min(2 * length, before.shape[1])
    other = change_tokens(text, model.vocab_size, generator)
    return Probe(model, parameters, input_ids[:ROWS].to(device), before[:, :length], text, other, state)


def change_tokens(input_ids: Tensor, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Return a text that differs from the given one at every position."""
    steps = torch.randint(1, vocab_size, input_ids.shape, generator=generator)
    return (input_ids + steps.to(input_ids.device)) % vocab_size


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run the block without gradients, in evaluation mode, uncompiled and at full matrix precision, and leave no trace of it.

    Modes, buffers and random states are afterwards what they were.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    precision = torch.get_float32_matmul_precision()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        # Other shapes than training's would each be compiled anew; TF32 would drown what is compared here.
        with torch.random.fork_rng(devices), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            torch.set_float32_matmul_precision("highest")
            model.eval()
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for module, is_training in modes:
            module.training = is_training
        for buffer, value in buffers:
            with torch.no_grad():
                buffer.copy_(value)


def change(new: Tensor, old: Tensor) -> float:
    """Return the largest difference over the largest size of `old`, unitless; infinite where one of them is NaN."""
    new, old = new.double(), old.double()
    ratio = ((new - old).abs().max() / old.abs().max().clamp_min(1e-30)).item()
    return math.inf if math.isnan(ratio) else ratio


def _read(model: LanguageModel, parameters: dict[str, Tensor], input_ids: Tensor) -> Any:
    # Any non-empty state serves: one sweep from zeros is parallel, the exact recurrence is not.
    zeros = next(model.parameters()).new_zeros(*input_ids.shape, model.dim) if model.has_feedback else None
    state = model.initial_state(input_ids.shape[0])
    output = torch.func.functional_call(model, parameters, (input_ids, state), {"previous_hidden": zeros})
    return output.state


def _woken(parameter: Tensor, generator: torch.Generator) -> Tensor:
    if parameter.any():
        woken = parameter.detach()
    else:
        woken = (torch.randn(parameter.shape, generator=generator) * 0.02).to(parameter.device, parameter.dtype)
    return woken.requires_grad_(parameter.requires_grad)  # what a model computes may depend on it


def _has_empty_part(state: Any) -> bool:
    """Whether a memory of the state still holds nothing; open segments of no token at all do not count."""
    tensors = [tensor for tensor in tensors_of(state).values() if tensor.is_floating_point() and tensor.numel() > 0]
    return not all(bool(tensor.any()) for tensor in tensors)
