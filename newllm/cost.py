"""What a run will cost, known before it starts: nothing is trained and no weight is made."""

from __future__ import annotations

import torch

from newllm.config.schema import TrainConfig
from newllm.data.module import build_data
from newllm.models.base import count_parameters
from newllm.models.create import build_model
from newllm.trainers.lagged_cache import DTYPES, cache_bytes


def describe_cost(config: TrainConfig) -> str:
    """Return a table of parameters, FLOPs, bytes and steps of a run; the model is built on the meta device.

    Raises:
        ValueError: whatever is wrong with the data.
    """
    data = build_data(config)
    data.prepare()
    with torch.device("meta"):
        model = build_model(config, data.vocab_size)
    parameters, length = count_parameters(model), config.data.block_length
    batch = config.data.batch_size * config.trainer.accumulate_batches
    visits = config.trainer.max_steps * batch / data.num_train_samples
    flops = model.flops_per_token(length)
    rows = [
        ("parameters", f"{parameters['total']:,} ({parameters['trainable']:,} trained)"),
        ("forward FLOPs per token", f"{flops:,.0f} at {length} tokens"),
        (
            "training FLOPs",
            f"{3 * flops * _sweeps(config) * batch * length * config.trainer.max_steps:.3g} (forward and backward)",
        ),
        ("state per text", f"{model.state_bytes(length):,} bytes after {length} tokens"),
        ("lagged cache", _cache(config, data.num_train_samples, model.dim)),
        ("steps", f"{config.trainer.max_steps:,} of {batch} blocks of {length} tokens"),
        ("visits per sample", f"{visits:.2f} ({data.num_train_samples:,} training blocks)"),
        ("validation", f"{data.num_validation_samples:,} blocks every {config.trainer.validate_every_steps:,} steps"),
        ("memory, about", f"{_memory_bytes(config, parameters['total'], data.vocab_size) / 2**20:,.0f} MiB"),
    ]
    return "\n".join(f"{name:<24} {value}" for name, value in rows)


def _sweeps(config: TrainConfig) -> int:
    """Differentiated sweeps of a step; 1 where there is no such thing, or it is decided while training."""
    sweeps = getattr(config.trainer, "sweeps", 1)
    return 1 if sweeps == "auto" else sweeps


def _cache(config: TrainConfig, num_samples: int, dim: int) -> str:
    kind = getattr(config.trainer, "cache", "none")
    if kind == "none":
        return "none"
    dtype = DTYPES[config.trainer.cache_dtype]  # type: ignore[attr-defined]  # the schema of trainer=lct
    return f"{cache_bytes(num_samples, config.data.block_length, dim, dtype):,} bytes ({kind})"


def _memory_bytes(config: TrainConfig, parameters: int, vocab_size: int) -> float:
    """Weights, gradients and two moments, and the activations of one batch: logits twice, about 20 hidden sizes a layer."""
    size = config.model
    tokens = config.data.batch_size * config.data.block_length
    dim, layers = getattr(size, "dim", config.size.dim), len(config.layers.stack)
    activations = tokens * (2 * vocab_size + 20 * dim * layers * _sweeps(config))
    return 4 * (4 * parameters + activations)
