"""How many positions a step may hold: what the logits need against what memory is free."""

from __future__ import annotations

import logging

import psutil
import torch

log = logging.getLogger(__name__)

SAFETY = 0.8  # of what is free; the rest is for what comes and goes
LOGITS_SHARE = 0.5  # of that; the other half is for weights' gradients and moments, and activations
COPIES_OF_LOGITS = 3.5  # logits, their softmax, their gradient, and half of one more while they are made
SMALLEST, LARGEST = 256, 16384  # positions


def batch_size_for(total: int, allocated: int, *, vocab_size: int) -> int:
    """Return the positions of a step: (total - allocated) * safety * share / (V * 4 * copies), within 256 and 16384.

    Args:
        total: bytes of the device.
        allocated: bytes in use, not those that an allocator holds in reserve.
        vocab_size: V.
    """
    room = (total - allocated) * SAFETY * LOGITS_SHARE
    return int(min(max(room / (vocab_size * 4 * COPIES_OF_LOGITS), SMALLEST), LARGEST))


def automatic_batch_size(vocab_size: int, accelerator: str) -> int:
    """Return the batch size that the memory of the machine allows, and say how it came about.

    Args:
        vocab_size: V.
        accelerator: cpu or gpu.
    """
    if accelerator == "gpu":
        total, allocated = torch.cuda.mem_get_info()[1], torch.cuda.memory_allocated()
    else:
        memory = psutil.virtual_memory()
        total, allocated = memory.total, memory.total - memory.available
    size = batch_size_for(total, allocated, vocab_size=vocab_size)
    log.info(
        "batch_size=auto: (%s total - %s allocated) bytes * %g safety * %g / (%d tokens * 4 bytes * %g copies), within %d and %d: %d",
        *(f"{total:,}", f"{allocated:,}", SAFETY, LOGITS_SHARE, vocab_size, COPIES_OF_LOGITS, SMALLEST, LARGEST, size),
    )
    return size
