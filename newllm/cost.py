"""What a run will cost, known before it starts: nothing is trained and no weight is made."""

from __future__ import annotations

from dataclasses import replace

import psutil
import torch

from newllm.config.compose import compose_model
from newllm.config.library import options
from newllm.config.schema import TrainConfig
from newllm.data.module import TextDataModule, build_data
from newllm.models.base import LanguageModel, count_parameters
from newllm.models.create import build_model
from newllm.trainers.build import training_module_class
from newllm.trainers.lagged_cache import DTYPES, cache_bytes


def describe_cost(config: TrainConfig) -> str:
    """Return a table of parameters, FLOPs, bytes and steps of a run; the model is built on the meta device.

    Raises:
        ValueError: whatever is wrong with the data.
    """
    data = build_data(config)
    data.prepare()
    model = _without_weights(config, data.vocab_size)
    parameters, length = count_parameters(model), config.data.block_length
    flops = model.flops_per_token(length)
    cache, contexts = _cache_bytes(config, data, model), _context_bytes(config, model, data)
    rows = [
        ("parameters", f"{parameters['total']:,} ({parameters['trainable']:,} trained)"),
        ("forward FLOPs per token", f"{flops:,.0f} at {length} tokens"),
        ("training FLOPs", _training_flops(config, data, model)),
        ("state per text", f"{model.state_bytes(length):,} bytes after {length} tokens"),
        ("lagged cache", _told(cache, config) if cache else "none"),
        *([("contexts", _told(contexts, config))] if contexts else []),
        *_steps(config, data),
        ("validation", f"{data.num_validation_samples:,} blocks every {config.trainer.validate_every_steps:,} steps"),
        *_memory(config, parameters, data, cache + contexts),
    ]
    return "\n".join(f"{name:<24} {value}" for name, value in rows)


def check_memory(config: TrainConfig, vocab_size: int) -> None:
    """Check, before any of it is allocated, that weights, gradients and moments fit where they are to be.

    What a batch needs beside them is told and not judged: it is an estimate, they are certain.

    Args:
        config: the whole configuration.
        vocab_size: of its data.
    Raises:
        ValueError: they do not fit; the message gives both figures.
    """
    parameters = count_parameters(_without_weights(config, vocab_size))
    runtime, copies = config.runtime, _copies(parameters, config)
    needed = copies / runtime.devices if runtime.strategy == "fsdp" else copies
    if runtime.accelerator == "cpu":
        needed *= runtime.devices  # each process holds its own
    free, where = _free_bytes(config)
    if needed <= free:
        return
    batch = _memory_bytes(config, parameters, vocab_size) - copies
    fitting = _sizes_within(free * copies / needed, config, vocab_size)
    raise ValueError(
        f"model: {parameters['total']:,} parameters need {needed / 2**30:,.1f} GiB for weights, gradients and moments (and a batch about "
        f"{batch / 2**30:,.1f} GiB more), there are {free / 2**30:,.1f} GiB {where}. Allowed: what fits, of the "
        f"named sizes {', '.join(fitting) or 'none'}. "
        "Choose a smaller size, model.num_layers or tokenizer.vocab_size, or share the model out among GPUs with runtime=fsdp."
    )


def out_of_memory(config: TrainConfig, vocab_size: int) -> str:
    """Return what to tell where a training step did not find the memory that it asked for: how many rows fit.

    Args:
        config: the whole configuration.
        vocab_size: of its data.
    """
    parameters = count_parameters(_without_weights(config, vocab_size))
    rows, has = config.data.batch_size, _has_bytes(config)
    copies = _copies(parameters, config)
    a_row = (_memory_bytes(config, parameters, vocab_size) - copies) / rows
    estimate = int(max(0.0, has - copies) / a_row) * config.runtime.devices
    fitting = [n for n in range(1, rows) if rows % n == 0 and n % config.runtime.devices == 0 and n <= max(1, estimate)]
    where, tokens = "the GPU" if config.runtime.accelerator == "gpu" else "this machine", config.data.block_length
    given = f"data.batch_size={rows}: a step of {rows} x {tokens} tokens does not fit the {has / 2**30:,.1f} GiB of {where}."
    if not fitting:
        return f"{given} Allowed: shorter blocks or a smaller model. Choose a smaller data.block_length or size."
    batches = config.trainer.accumulate_batches * rows // fitting[-1]
    return (
        f"{given} Allowed: about {', '.join(map(str, fitting))}. Set data.batch_size={fitting[-1]} and "
        f"trainer.accumulate_batches={batches}, which make the same steps."
    )


def _without_weights(config: TrainConfig, vocab_size: int) -> LanguageModel:
    """The model on the meta device."""
    try:
        with torch.device("meta"):
            return build_model(config, vocab_size)
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise ValueError(
            "model: one of its weights has more bytes than can be numbered. Allowed: what fits into memory. "
            "Choose a smaller size, or lower the widths of model."
        ) from None


def _sizes_within(nbytes: float, config: TrainConfig, vocab_size: int) -> list[str]:
    """Named sizes whose weights, gradients and moments take at most so many bytes."""
    found = []
    for name in options("size"):
        other = replace(compose_model("pythia", size=name, keys={}), runtime=config.runtime, trainer=config.trainer)
        parameters = count_parameters(_without_weights(other, vocab_size))
        if _copies(parameters, other) <= nbytes:
            found.append(f"size={name}")
    return found


def _has_bytes(config: TrainConfig) -> float:
    """All bytes of the device, those in use included."""
    if config.runtime.accelerator == "gpu":
        return torch.cuda.mem_get_info()[1]
    return psutil.virtual_memory().total


def _free_bytes(config: TrainConfig) -> tuple[int, str]:
    """Return the bytes that a model may take, and where they are."""
    if config.runtime.accelerator == "gpu":
        return torch.cuda.mem_get_info()[0], "free on the GPU"
    return psutil.virtual_memory().available, "of free memory"


def _memory(
    config: TrainConfig, parameters: dict[str, int], data: TextDataModule, kept_bytes: int
) -> list[tuple[str, str]]:
    """What the device and the host are to hold; caches and contexts lie in the host's RAM, whatever the device is."""
    model = _memory_bytes(config, parameters, data.vocab_size)
    kept = kept_bytes if _where_kept(config) == "ram" else 0
    # Libraries and data are loaded: this is what they take before there is a model.
    own = f"program and data take {_mib(psutil.Process().memory_info().rss)} besides, validation and checkpoints come on top"
    of_kept = f", with {_mib(kept)} of kept states" if kept else ""
    if config.runtime.accelerator != "gpu":
        return [("memory, about", f"{_mib(model + kept)} for the model and a batch{of_kept}{_of_free(config)}; {own}")]
    return [
        ("GPU memory, about", f"{_mib(model)}{_of_free(config)}"),
        ("RAM, about", f"{_mib(kept)} of kept states; {own}"),
    ]


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:,.0f} MiB"


def _of_free(config: TrainConfig) -> str:
    if config.runtime.accelerator == "gpu" and not torch.cuda.is_available():
        return ""  # the run is meant for another machine
    free, where = _free_bytes(config)
    return f", there are {_mib(free)} {where}"


def _copies(parameters: dict[str, int], config: TrainConfig) -> float:
    """Bytes of the weights, of the gradients and two moments of those that are trained, and of their average."""
    value = 8 if config.runtime.precision == "64-true" else 4
    average = parameters["total"] if config.trainer.ema_decay is not None else 0
    return value * (parameters["total"] + 3 * parameters["trainable"] + average)


def _where_kept(config: TrainConfig) -> str:
    """Where a procedure keeps states of the training text: ram, disk or none."""
    return getattr(config.trainer, "cache", "ram")


def _told(nbytes: int, config: TrainConfig) -> str:
    return f"{nbytes:,} bytes ({_where_kept(config)})"


def _context_bytes(config: TrainConfig, model: LanguageModel, data: TextDataModule) -> int:
    """Bytes kept of every position of the training text, of procedures that keep something."""
    values = training_module_class(config.trainer.kind).kept_values(model)
    return 4 * values * data.num_train_samples * config.data.block_length


def _steps(config: TrainConfig, data: TextDataModule) -> list[tuple[str, str]]:
    """How many, of how much text, and how often each sample is visited."""
    length, steps = config.data.block_length, config.trainer.max_steps
    total = data.num_train_samples * length
    positions = training_module_class(config.trainer.kind).positions_per_step(config, total)
    if positions is None:
        return [("steps", f"{steps:,} at most, of as many positions as fit")]
    blocks = config.data.batch_size * config.trainer.accumulate_batches
    if positions == blocks * length:
        blocks = _blocks_of_step(config, data)
        positions, each = blocks * length, f"{blocks} blocks of {length} tokens"
    else:
        each = f"{positions:,} positions"
    return [("steps", f"{steps:,} of {each}"), ("visits per sample", _visits(data, steps * positions / max(total, 1)))]


def _blocks_of_step(config: TrainConfig, data: TextDataModule) -> int:
    """Blocks of one optimizer step; one never goes over the end of an epoch."""
    blocks = config.data.batch_size * config.trainer.accumulate_batches
    return blocks if data.prepared.stream is not None else min(blocks, data.num_train_samples)


def _visits(data: TextDataModule, visits: float) -> str:
    if data.prepared.stream is not None:
        return "1 in each pass over the corpus, which is streamed and not counted"
    return f"{visits:.2f} ({data.num_train_samples:,} training blocks)"


def _training_flops(config: TrainConfig, data: TextDataModule, model: LanguageModel) -> str:
    per_token = training_module_class(config.trainer.kind).training_flops_per_token(model, config)
    if per_token is None:
        return "not known before"
    tokens = _blocks_of_step(config, data) * config.data.block_length
    return f"{per_token * tokens * config.trainer.max_steps:.3g} ({per_token:,.0f} per token, forward and backward)"


def _sweeps(config: TrainConfig) -> int:
    """Differentiated sweeps of a step, 1 where there is no such thing, or it is decided while training; a Newton step and a sweep are 2."""
    if _makes_newton_steps(config):
        return 2
    sweeps = getattr(config.trainer, "sweeps", 1)
    return 1 if sweeps == "auto" else sweeps


def _makes_newton_steps(config: TrainConfig) -> bool:
    return getattr(config.trainer, "solver", "sweeps") == "newton"


def _cache_bytes(config: TrainConfig, data: TextDataModule, model: LanguageModel) -> int:
    """Bytes of the lagged cache; 0 where there is none."""
    if _where_kept(config) == "none" or not hasattr(config.trainer, "cache_dtype"):
        return 0
    dtype = DTYPES[config.trainer.cache_dtype]
    return cache_bytes(data.num_train_samples, config.data.block_length, model.dim, dtype)


def _memory_bytes(config: TrainConfig, parameters: dict[str, int], vocab_size: int) -> float:
    """Weights, gradients and moments, and the activations of one batch: logits twice, about 20 hidden sizes a layer.

    With Newton steps also the derivatives of each state by the one before, and what they are turned into for the way back.
    """
    size = config.model
    tokens = config.data.batch_size * config.data.block_length
    dim, layers = getattr(size, "dim", config.size.dim), len(config.layers.stack)
    activations = tokens * (2 * vocab_size + 20 * dim * layers * _sweeps(config))
    if _makes_newton_steps(config):
        carried = getattr(size, "context_width", getattr(size, "context_dim", dim))
        activations += tokens * 3 * carried**2
    return _copies(parameters, config) + (8 if config.runtime.precision == "64-true" else 4) * activations
