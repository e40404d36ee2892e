"""What a run proves about its model before step 0: causal, rows apart, nothing hidden, the same in training and evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from newllm.data.prepared import NO_TARGET
from newllm.guards.data_checks import first_labelled
from newllm.guards.probe import PROBE_TOKENS, ROWS, Probe, change, change_tokens
from newllm.guards.verdict import Verdict
from newllm.models.base import LanguageModel, count_parameters
from newllm.recurrence import shift
from newllm.state import tensors_of

# Relative to the largest value. The same shapes give the same bits; kernels that add in another order differ by less than this.
SAME = {torch.float64: 1e-10}
SAME_BELOW_FLOAT64 = 1e-5
# One position at a time is another order of every sum: some ten times the rounding of the same shapes.
ORDER_FACTOR = 10


def _causality_verdict(
    name: str,
    call: str,
    probe: Probe,
    num_positions: int,
    generator: torch.Generator,
    leak_at: Callable[[int], float],
) -> Verdict:
    """Judge how much the logits up to random positions change with what comes after them."""
    length = probe.input_ids.shape[1]
    positions = sorted(torch.randperm(length - 1, generator=generator)[:num_positions].tolist())
    leaks = {position: leak_at(position) for position in positions}
    worst = max(leaks, key=leaks.__getitem__)
    figures = {"positions": positions, "largest_change": leaks[worst], "tokens_before": probe.first_ids.shape[1]}
    dtype = next(probe.model.parameters()).dtype
    if leaks[worst] <= _same(dtype):
        return Verdict(name, "passed", "Later tokens change nothing at earlier positions.", figures)
    return _failed(
        name,
        f"in {call}, tokens after position {worst} change logits up to it by {leaks[worst]:.2g} of the largest",
        "no change",
        "Look for a mask, a memory read or a mean over positions that reaches past its position",
        figures,
    )


def _changed_after(probe: Probe, position: int) -> Tensor:
    return torch.cat([probe.input_ids[:, : position + 1], probe.other_ids[:, position + 1 :]], dim=1)


def _random_states(probe: Probe, input_ids: Tensor, generator: torch.Generator) -> Tensor:
    like = next(probe.model.parameters())
    return torch.randn(*input_ids.shape, probe.model.dim, generator=generator).to(like.device, like.dtype)


def _hidden_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Buffers, and tensors that modules keep as plain attributes, where no state_dict shows them."""
    found = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                found[f"{prefix}.{name}".lstrip(".")] = value.detach().clone()
    return found


@contextmanager
def _as_in_training(model: nn.Module) -> Iterator[None]:
    """Train mode and gradients, dropout aside: it is meant to differ."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        model.eval()


def _same(dtype: torch.dtype) -> float:
    return SAME.get(dtype, SAME_BELOW_FLOAT64)


def _failed(name: str, found: str, allowed: str, advice: str, figures: dict) -> Verdict:
    return Verdict(name, "failed", f"guards.{name}: {found}. Allowed: {allowed}. {advice}.", figures)


def check_finite(probe: Probe) -> Verdict:
    """Check that the model gives numbers."""
    logits = probe.logits(probe.input_ids)
    wrong = int((~torch.isfinite(logits)).sum())
    figures = {"nonfinite_logits": wrong, "logits": logits.numel()}
    if wrong == 0:
        return Verdict("finite", "passed", "All logits are finite.", figures)
    return _failed(
        "finite",
        f"{wrong} of {logits.numel()} logits are NaN or infinite before the first step",
        "0",
        "Look at the initial weights and at divisions by sums that can be 0",
        figures,
    )


def check_causality(probe: Probe, num_positions: int, generator: torch.Generator) -> Verdict:
    """Check that no logit of the deployed function depends on a later token."""
    logits = probe.logits(probe.input_ids)

    def leak_at(position: int) -> float:
        changed = probe.logits(_changed_after(probe, position))
        return change(changed[:, : position + 1], logits[:, : position + 1])

    return _causality_verdict("causality", "a forward pass", probe, num_positions, generator, leak_at)


def check_sweep_causality(probe: Probe, num_positions: int, generator: torch.Generator) -> Verdict:
    """Check that in one parallel sweep no logit depends on a later token or on a later previous state."""
    if not probe.model.has_feedback:
        return Verdict("sweep_causality", "not applicable", "The model has no feedback: there are no sweeps.")
    previous, other_previous = (_random_states(probe, probe.input_ids, generator) for _ in range(2))
    logits = probe.logits(probe.input_ids, previous_hidden=previous)

    def leak_at(position: int) -> float:
        later = torch.cat([previous[:, : position + 1], other_previous[:, position + 1 :]], dim=1)
        changed = probe.logits(_changed_after(probe, position), previous_hidden=later)
        return change(changed[:, : position + 1], logits[:, : position + 1])

    return _causality_verdict("sweep_causality", "one sweep", probe, num_positions, generator, leak_at)


def check_rows(probe: Probe, generator: torch.Generator) -> Verdict:
    """Check that what a row reads, and what it read before, changes nothing for another row."""
    first, text = probe.first_ids.clone(), probe.input_ids.clone()
    first[1], text[1] = change_tokens(first, probe.model.vocab_size, generator)[1], probe.other_ids[1]
    own = probe.run(probe.input_ids)
    other = probe.run(text, probe.read(first))
    states = [tensors_of(output.state.select([0])) for output in (other, own)]
    changes = {
        "states of the last layer": change(other.hidden[0], own.hidden[0]),
        "logits": change(other.logits[0], own.logits[0]),  # type: ignore[index]  # a model called whole gives them
    }
    changes |= {
        f"state {name}": change(states[0][name], states[1][name]) for name in states[1] if states[1][name].numel()
    }
    worst = max(changes, key=changes.__getitem__)
    figures = {"largest_change": changes[worst]}
    if changes[worst] <= _same(own.hidden.dtype):
        return Verdict("rows", "passed", "The rows of a batch do not mix.", figures)
    return _failed(
        "rows",
        f"another text in row 1 changes row 0 ({worst} by {changes[worst]:.2g} of its largest value)",
        "no change",
        "Look for a memory without batch axis, or a mean over the batch",
        figures,
    )


def check_repeatable(probe: Probe) -> Verdict:
    """Check that a call leaves nothing behind: the next with the same arguments gives the same, and buffers stay as they were."""
    before = _hidden_tensors(probe.model)
    first = probe.logits(probe.input_ids)
    probe.logits(probe.other_ids)
    second = probe.logits(probe.input_ids)
    after = _hidden_tensors(probe.model)
    altered = sorted(name for name in after if name not in before or not torch.equal(before[name], after[name]))
    difference = change(second, first)
    figures = {"largest_change": difference, "altered": altered}
    if not altered and difference <= _same(first.dtype):
        return Verdict("repeatable", "passed", "The same call gives the same logits; no buffer changes.", figures)
    found = f"a call alters {', '.join(altered)}" if altered else "a second identical call gives other logits"
    return _failed(
        "repeatable",
        f"{found} (logits differ by {difference:.2g} of the largest)",
        "equal logits and unchanged buffers",
        "Move what the model remembers into its State, which the caller owns",
        figures,
    )


def check_trained_is_evaluated(probe: Probe, generator: torch.Generator) -> Verdict:
    """Check that what training computes, in parallel and with gradients, is the function that is deployed.

    Compared are states of the exact recurrence (of two calls, without feedback), of whole blocks in pieces, and scores.
    """
    found = {
        "one sweep from the exact states" if probe.model.has_feedback else "one pass": _change_of_states(probe),
        "one call over a whole block": _change_of_block(probe, generator),
        "what the loss reads in place of the scores": _change_of_scores(probe, generator),
    }
    worst = max(found, key=found.__getitem__)
    allowed = ORDER_FACTOR * _same(next(probe.model.parameters()).dtype)
    figures = {"largest_change": found[worst]}
    if found[worst] <= allowed:
        return Verdict("trained_is_evaluated", "passed", "Training and evaluation compute the same function.", figures)
    return _failed(
        "trained_is_evaluated",
        f"{worst} in training mode differs from evaluation in pieces by {found[worst]:.2g} of the largest value",
        f"at most {allowed:.0e}",
        "Look for what depends on model.training, on gradients, on the length of the call or on calls before, "
        "and for positions that see later ones",
        figures,
    )


def _change_of_states(probe: Probe) -> float:
    text = probe.input_ids
    if probe.model.has_feedback:
        deployed = probe.run(text).hidden
        previous = shift(deployed, probe.state.hidden)
    else:
        half = text.shape[1] // 2
        start = probe.run(text[:, :half])
        deployed = torch.cat([start.hidden, probe.run(text[:, half:], start.state).hidden], dim=1)
        previous = None
    with _as_in_training(probe.model):
        probe.run(probe.other_ids, previous_hidden=previous)  # what it leaves behind must not show in the next
        trained = probe.run(text, previous_hidden=previous).hidden.detach()
    return change(trained, deployed)


def _change_of_block(probe: Probe, generator: torch.Generator) -> float:
    """What needs more tokens than a probe has shows here; a piece has no later ones to see."""
    model, block = probe.model, probe.block_ids
    # Any states serve as previous ones: each position reads its own.
    previous = _random_states(probe, block, generator) if model.has_feedback else None
    state: Any = model.initial_state(len(block))
    pieces: list[Tensor] = []
    for start in range(0, block.shape[1], PROBE_TOKENS):
        piece = slice(start, start + PROBE_TOKENS)
        output = probe.run(block[:, piece], state, previous_hidden=None if previous is None else previous[:, piece])
        state, pieces = output.state, [*pieces, output.hidden]
    with _as_in_training(model):
        trained = probe.run(block, model.initial_state(len(block)), previous_hidden=previous).hidden.detach()
    return change(trained, torch.cat(pieces, dim=1))


def _change_of_scores(probe: Probe, generator: torch.Generator) -> float:
    model, hidden = probe.model, _random_states(probe, probe.input_ids, generator)
    deployed = model.logits(hidden)
    with _as_in_training(model):
        head = model.linear_head(hidden.flatten(0, 1))
        trained = model.logits(hidden) if head is None else nn.functional.linear(*head).view_as(deployed)
    return change(trained.detach(), deployed)


def check_initial_loss(
    model: LanguageModel, batch: dict[str, Tensor], low: float, high: float, *, is_fresh: bool
) -> Verdict:
    """Check that a fresh model's loss is about ln V: it knows nothing, and is not sure of wrong answers.

    Args:
        model: as it starts.
        batch: input_ids and labels [B, T].
        low: smallest loss expected, times ln V.
        high: largest loss expected, times ln V.
        is_fresh: the weights are random; of others no first loss is expected.
    """
    if not is_fresh:
        return Verdict("initial_loss", "not applicable", "The weights are not random: the run continues others.")
    device = next(model.parameters()).device
    start = first_labelled(batch["labels"][:ROWS], PROBE_TOKENS)
    window = (slice(ROWS), slice(start, start + PROBE_TOKENS))
    input_ids, labels = batch["input_ids"][window].to(device), batch["labels"][window].to(device)
    if not (labels != NO_TARGET).any():
        return Verdict("initial_loss", "not applicable", "The first rows of the batch have no target.")
    logits = model.logits(model(input_ids).hidden).flatten(0, 1).double()
    loss = nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=NO_TARGET).item()
    expected = math.log(logits.shape[-1])
    figures = {"loss_nats": loss, "log_vocabulary_nats": expected}
    said = f"the first loss is {loss:.3f} nats, {loss / expected:.2f} ln V"
    if low * expected <= loss <= high * expected:
        return Verdict("initial_loss", "passed", f"{said[0].upper()}{said[1:]}.", figures)
    message = (
        f"guards.initial_loss: {said}. Allowed: {low} to {high} ln V. "
        "Look at the scale of the initial weights; below the range, also for targets that the model can see."
    )
    return Verdict("initial_loss", "warning", message, figures)


def check_tied_weights(model: LanguageModel) -> Verdict:
    """Check that exactly those parameters share storage that the model says are tied."""
    shared = [set(names) for names in count_parameters(model)["shared"]]
    declared = [set(names) for names in model.tied_parameters]
    apart = [names for names in declared if not any(names <= group for group in shared)]
    joined = [names for names in shared if not any(names <= group for group in declared)]
    figures = {"tied": [sorted(names) for names in declared], "shared": [sorted(names) for names in shared]}
    if not apart and not joined:
        return Verdict("tied_weights", "passed", "Tied weights share storage, and no others do.", figures)
    names = " and ".join(sorted((apart or joined)[0]))
    found = (
        "are declared as tied and lie in separate storage" if apart else "share storage and are not declared as tied"
    )
    return _failed(
        "tied_weights",
        f"{names} {found}",
        f"tied are {figures['tied'] or 'none'}",
        "Tie them by assigning one parameter to both names, after moving and loading; name groups in the model's tied_parameters",
        figures,
    )
