"""What a run proves about its data before step 0: targets moved once, splits disjoint, few tokens unseen."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from newllm.data.prepared import NO_TARGET
from newllm.guards.verdict import Verdict

if TYPE_CHECKING:
    from newllm.data.module import TextDataModule
    from newllm.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

SHOWN = 16  # tokens of the decoded example


def check_targets(batch: dict[str, Tensor], data: TextDataModule, tokenizer: Tokenizer | None) -> Verdict:
    """Check that the target of every position is the input of the next; shows an example at debug level.

    Args:
        batch: input_ids and labels [B, T].
        data: says whether targets are next tokens at all.
        tokenizer: decodes the example; None where there is no text.
    """
    input_ids, labels = batch["input_ids"], batch["labels"]
    _show_example(input_ids[0, :SHOWN], labels[0, :SHOWN], tokenizer)
    has_target = labels != NO_TARGET
    num_targets = int(has_target.sum())
    if num_targets == 0:
        return Verdict(
            "targets",
            "failed",
            f"guards.targets: none of the batch's {labels.numel()} positions has a target. Allowed: at least 1. "
            "Look at the labels that the data source makes.",
            {"targets": 0},
        )
    if not data.targets_are_next_tokens:
        message = "The data source says that its targets are not the next tokens."
        return Verdict("targets", "not applicable", message, {"targets": num_targets})
    wrong = _mismatches(input_ids, labels, 1)
    figures = {"targets": num_targets, "mismatches": wrong}
    if wrong == 0:
        return Verdict("targets", "passed", "Targets are the inputs moved by one.", figures)
    moved = [shift for shift in (0, 2, -1) if _mismatches(input_ids, labels, shift) == 0]
    found = f"are the inputs moved by {moved[0]}" if moved else f"differ from the next input at {wrong} positions"
    return Verdict(
        "targets",
        "failed",
        f"guards.targets: the batch's targets {found}. Allowed: the inputs moved by 1. "
        "Shift once, where blocks are cut (newllm/data/blocks.py), and nowhere else.",
        figures,
    )


def check_splits(data: TextDataModule) -> Verdict:
    """Check that no text is both trained on and validated on."""
    train, validation = data.train_document_hashes, data.validation_document_hashes
    figures = {"train_documents": len(train), "validation_documents": len(validation)}
    if not train or not validation:
        return Verdict("splits", "not applicable", "The data source names no texts.", figures)
    shared = sorted(train & validation)
    if not shared:
        message = "No validation text is a training text."
        return Verdict("splits", "passed", message, {**figures, "shared_documents": 0})
    return Verdict(
        "splits",
        "failed",
        f"guards.splits: {len(shared)} of {len(validation)} validation texts are training texts too (the first has SHA-256 "
        f"{shared[0][:16]}). Allowed: 0. Take them out of one split: data.validation or the split rule decides.",
        {**figures, "shared_documents": len(shared)},
    )


def check_unseen(data: TextDataModule) -> Verdict:
    """Check that few validation tokens have an id that training never shows."""
    share, max_unseen = data.facts.get("unseen_share"), data.data_config.max_unseen
    if share is None:
        return Verdict("unseen_tokens", "not applicable", "The data source counts no unseen tokens.")
    figures = {"unseen_share": share, "max_unseen": max_unseen}
    said = f"{share:.4f} of the validation tokens have an id that never occurs in training"
    if share <= max_unseen:
        return Verdict("unseen_tokens", "passed", f"{said}.", figures)
    return Verdict(
        "unseen_tokens",
        "failed",
        f"guards.unseen_tokens: {said}. Allowed: at most data.max_unseen={max_unseen}. "
        "Train on more text, lower tokenizer.vocab_size or raise data.max_unseen.",
        figures,
    )


def _mismatches(input_ids: Tensor, labels: Tensor, shift: int) -> int:
    """Targets that are not the input `shift` positions later, where both are in the block."""
    length = input_ids.shape[1]
    own = labels[:, max(-shift, 0) : length - max(shift, 0)]
    later = input_ids[:, max(shift, 0) : length - max(-shift, 0)]
    return int(((own != later) & (own != NO_TARGET)).sum())


def _show_example(input_ids: Tensor, labels: Tensor, tokenizer: Tokenizer | None) -> None:
    if not log.isEnabledFor(logging.DEBUG):
        return
    targets = labels[labels != NO_TARGET].tolist()
    if tokenizer is None:
        log.debug("inputs  %s\ntargets %s", input_ids.tolist(), targets)
    else:
        log.debug("inputs  %r\ntargets %r", tokenizer.decode(input_ids.tolist()), tokenizer.decode(targets))


def first_labelled(labels: Tensor, length: int) -> int:
    """Return where a window of `length` positions begins that holds the first target."""
    columns = torch.nonzero((labels != NO_TARGET).any(dim=0)).flatten()
    first = int(columns[0]) if len(columns) > 0 else 0
    return max(0, min(first, labels.shape[1] - length))
