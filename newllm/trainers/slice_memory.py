"""What a slice of contexts takes of the memory, known before the first one is computed.

n: positions of a slice. C: context size. L: layers of the context block.
"""

from __future__ import annotations

import logging

import psutil
import torch
from torch import nn

from newllm.models.context import ContextLM
from newllm.trainers.context_cache import SHARE_OF_FREE

log = logging.getLogger(__name__)


def slice_bytes(model: ContextLM, num_positions: int, *, is_trained: bool) -> int:
    """Return the bytes that a slice takes at the least: its tokens, its contexts before and after, and what lies between them.

    Args:
        model: gives the context block; fp32.
        num_positions: n.
        is_trained: gradients are wanted, which keeps inputs and results of all maps; otherwise only of the widest one.
    """
    maps = [part for part in model.context_block.modules() if isinstance(part, nn.Linear)]
    norms = [part for part in model.context_block.modules() if isinstance(part, nn.LayerNorm)]
    widths = [part.in_features + part.out_features for part in maps]
    between = sum(widths) + 2 * model.context_dim * len(norms) if is_trained else max(widths)
    ends = model.token_dim * model.config.num_input_tokens + 2 * model.context_dim
    return 4 * num_positions * (ends + between)


def check_slice(model: ContextLM, num_positions: int, *, is_trained: bool, accelerator: str) -> None:
    """Say what a slice takes, and raise where that is more than there is.

    Args:
        model: gives the context block.
        num_positions: n: `trainer.slice_tokens`, or fewer where the text is shorter.
        is_trained: gradients are wanted.
        accelerator: cpu or gpu.
    Raises:
        ValueError: it is more; the message gives both figures and the longest slice that would do.
    """
    needed = slice_bytes(model, num_positions, is_trained=is_trained)
    if accelerator == "gpu":
        free, place = torch.cuda.mem_get_info()[0], "free on the GPU"
    else:
        free, place = psutil.virtual_memory().available, "of free memory"
    log.info("a slice of %s positions takes at least %s bytes", f"{num_positions:,}", f"{needed:,}")
    if needed > SHARE_OF_FREE * free:
        most = int(SHARE_OF_FREE * free / needed * num_positions)
        raise ValueError(
            f"trainer.slice_tokens: a slice of {num_positions:,} positions takes at least {needed / 2**30:.2f} GiB, there are "
            f"{free / 2**30:.2f} GiB {place}. Allowed: at most {SHARE_OF_FREE:.0%} of it, {most:,} positions. "
            "Set trainer.slice_tokens to that or less."
        )
