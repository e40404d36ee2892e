"""Cross entropy of logits that are one linear map, a few rows at a time: the logits of all rows never exist together.

N: rows. F: features, the width of what the head reads. V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from newllm.linear import linear, multiply, outer

NO_TARGET = -100

# Bytes of the logits made at once, by device. On a CPU a chunk that is written, read and written again should not leave the
# caches for long; a GPU needs thousands of rows to be busy.
MAX_LOGITS_BYTES = {"cpu": 2**26, "cuda": 2**30}


# Logits of `mean_nats` at once on a CPU: as many as stay in the caches, of a large vocabulary the rows that products need to be fast.
CACHED_LOGITS_BYTES = 2**24
LEAST_ROWS = 256


def rows_at_once(features_NF: Tensor, vocab_size: int) -> int:
    """Return how many rows' logits, in fp32, fit the limit of the device; at least 1."""
    width = max(4, features_NF.element_size())
    return max(1, MAX_LOGITS_BYTES.get(features_NF.device.type, 2**26) // (width * vocab_size))


def rows_of_chunks(features_NF: Tensor, vocab_size: int) -> int:
    """Return how many rows `mean_nats` should take at once on the device, within its limit."""
    limit = rows_at_once(features_NF, vocab_size)
    if features_NF.device.type != "cpu":
        return limit
    return min(limit, max(LEAST_ROWS, CACHED_LOGITS_BYTES // (max(4, features_NF.element_size()) * vocab_size)))


def mean_nats(features_NF: Tensor, weight: Tensor, bias: Tensor | None, targets_N: Tensor, *, rows: int) -> Tensor:
    """Return the mean cross entropy over all targets, nats; the same number and gradients as from whole logits.

    The gradient is formed beside the loss, chunk by chunk, so nothing is computed twice and no logits are kept for the way back.

    Args:
        features_NF: what the head reads.
        weight: of the head [V, F].
        bias: of the head [V], or None.
        targets_N: token ids; `NO_TARGET` rows do not count.
        rows: rows whose logits exist at once.
    """
    weight, features_NF = _as_autocast(weight), _as_autocast(features_NF)
    return _MeanNats.apply(features_NF, weight, bias, targets_N, rows, torch.is_grad_enabled())


def row_nats(features_NF: Tensor, weight: Tensor, bias: Tensor | None, targets_N: Tensor, *, rows: int) -> Tensor:
    """Return the cross entropy of every row [N], nats; 0 without a target. Arguments as for `mean_nats`.

    The rows' weights in the loss are not known yet: their logits are made once more on the way back.
    """

    def part(features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        logits = at_least_fp32(linear(features, weight, bias))
        return nn.functional.cross_entropy(logits, targets, ignore_index=NO_TARGET, reduction="none")

    chunks = zip(features_NF.split(rows), targets_N.split(rows), strict=True)
    return torch.cat([checkpoint(part, f, weight, bias, t, use_reentrant=False) for f, t in chunks])


def at_least_fp32(logits: Tensor) -> Tensor:
    """Return the logits in fp32 or wider: the log-sum-exp over the vocabulary loses its small terms below that."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _as_autocast(tensor: Tensor) -> Tensor:
    """The dtype in which autocast would multiply; a Function's own products are not seen by it."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def _to_nats_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of each row, 0 without a target, and its gradient by the logits, in whose memory it is where the dtype allows.

    The exponential is taken once: the sum of all is in the largest share, which never underflows.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    is_target = (targets != NO_TARGET).unsqueeze(1)
    # Another number that is no token is found out where it is looked up.
    index = targets.unsqueeze(1).where(is_target, 0)
    largest, own = logits.amax(dim=1, keepdim=True).to(wide), logits.gather(1, index).to(wide)
    in_place = logits.dtype == wide and logits.device.type == "cpu"
    shares = torch.softmax(logits, dim=1, out=logits) if in_place else logits.softmax(dim=1, dtype=wide)
    nats = (largest - shares.amax(dim=1, keepdim=True).log() - own) * is_target
    shares.scatter_add_(1, index, shares.new_full((), -1.0).expand(index.shape))
    return nats, shares


@cache
def _part(device_type: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Fused on CUDA, where the passes over a chunk would cost more than its products."""
    compiled: Any = torch.compile(_to_nats_and_gradient, dynamic=False)
    return compiled if device_type == "cuda" else _to_nats_and_gradient


class _MeanNats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int, differentiate: bool
    ) -> Tensor:
        wide = torch.promote_types(features.dtype, torch.float32)
        wants_features, wants_weight, wants_bias = (differentiate and wanted for wanted in ctx.needs_input_grad[:3])
        is_target = (targets != NO_TARGET).unsqueeze(1)
        num_targets = is_target.sum()
        # The narrow factors leave out rows without a target and take the mean: the wide ones are not read once more for it. In half
        # precision a share of many targets would vanish.
        is_mean = features.dtype == wide
        share = is_target / num_targets if is_mean else is_target
        total = features.new_zeros((), dtype=wide)
        by_features = torch.empty_like(features) if wants_features else None
        by_weight: Tensor | None = None
        by_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wants_bias else None
        to_add = None if bias is None else bias.to(features.dtype)
        nats_and_gradient = _part(features.device.type)
        # One piece of memory for all chunks: a new one each time is new pages each time.
        memory = features.new_empty(min(rows, features.shape[0]), weight.shape[0])
        for start in range(0, features.shape[0], rows):
            part = slice(start, start + rows)
            logits = multiply(features[part], weight, to_add, out=memory[: features[part].shape[0]])
            nats, gradient = nats_and_gradient(logits, targets[part])
            total += nats.sum()
            gradient = gradient.to(features.dtype)
            if by_features is not None:
                torch.mul(multiply(gradient, weight.T), share[part], out=by_features[part])
            if wants_weight:
                counted = features[part] * share[part]
                if by_weight is None:
                    by_weight = outer(gradient, counted).to(wide)
                elif by_weight.dtype == gradient.dtype:
                    by_weight.addmm_(gradient.T, counted)
                else:
                    by_weight += gradient.T @ counted
            if by_bias is not None:
                by_bias += share[part].to(gradient.dtype).T.matmul(gradient).squeeze(0)
            del logits, gradient  # before the next chunk has its own
        ctx.is_mean = is_mean
        ctx.save_for_backward(by_features, by_weight, by_bias, num_targets)
        ctx.dtypes = (features.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total / num_targets

    @staticmethod
    def backward(ctx: Any, by_loss: Tensor) -> tuple[Tensor | None, ...]:
        # The gradients were made with the loss: nothing is left that theirs could be made of.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "loss: gradients of its gradients were asked for (create_graph=True). Allowed: first gradients. "
                "Take torch.nn.functional.cross_entropy of model.logits(hidden), which has them of any order."
            )
        *gradients, num_targets = ctx.saved_tensors
        scale = by_loss if ctx.is_mean else by_loss / num_targets
        # A gradient as large as the embedding is not copied for nothing. Asked in the host's memory only, where nothing waits for it.
        if scale.device.type == "cpu" and scale.numpy() == 1:
            return (*gradients, None, None, None)
        scaled = [
            None if gradient is None else (gradient * scale).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None)
