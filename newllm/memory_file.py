"""The memory file: what a model has read, in a form that another machine with the same model can take up.

It holds the compressive memories, their open segments and counters, and the last hidden state of a recurrence: everything of a
state that does not grow with the text. Keys and values of ordinary attention stay behind; reading on fills them again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from newllm.layers.memory import LinearMemory
from newllm.layers.memory_layer import MemoryLayer
from newllm.layers.memory_state import MemoryLayerState
from newllm.layers.pythia import PythiaState
from newllm.models.base import LanguageModel
from newllm.reading import layer_of
from newllm.state import FORMAT_VERSION, State, describe, map_parts, parts_of, tensors_of

CONTENTS = "newllm memory"
_RAGGED = {field.name for field in dataclasses.fields(MemoryLayerState) if field.metadata.get("ragged")}


@dataclass(frozen=True)
class ExportedBanks(State):
    """Some banks of every memory layer, from the bottom."""

    memories: tuple[LinearMemory, ...]


def fingerprint(model: LanguageModel) -> str:
    """Return the SHA-256 of a model's weights and layer configuration: a memory means something to this model only."""
    digest = hashlib.sha256(json.dumps(_configuration(model), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def memory_layer(model: LanguageModel, name: str) -> MemoryLayer:
    """Return the memory layer of a part of the model's state, by the part's dotted name."""
    layer = layer_of(model, name)
    assert isinstance(layer, MemoryLayer), f"{name} is no memory layer's state"
    return layer


def check_banks(banks: Sequence[int], model: LanguageModel, *, where: str) -> None:
    """Refuse bank indices that a memory layer does not have, or that are named twice.

    Raises:
        ValueError: there is no memory layer, no bank is named, one is named twice, or one does not exist.
    """
    parts = parts_of(model.initial_state(1), MemoryLayerState)
    if not parts:
        raise ValueError(
            f"{where}: the model has no memory layer. Allowed: stacks with one. Build it with model=infini."
        )
    limit = min(len(part.frozen) for part in parts.values())
    if not banks or len(set(banks)) < len(banks) or any(not 0 <= bank < limit for bank in banks):
        raise ValueError(
            f"{where}: banks {list(banks)} cannot be taken. Allowed: different ones of 0 to {limit - 1}, at least one. "
            "Choose among these."
        )


def without_caches(state: Any) -> Any:
    """Return the state with the keys and values of ordinary attention emptied: all that is left has a fixed size."""

    def empty(_: str, cache: PythiaState) -> PythiaState:
        return cache.last(0)

    return map_parts(state, PythiaState, empty)


def take_banks(memory: LinearMemory, banks: Sequence[int]) -> LinearMemory:
    """Return the memory of the given banks only, in the given order."""
    found = memory.banks()
    return memory.with_banks([found[bank] for bank in banks])


def save_memory(path: str | Path, model: LanguageModel, state: Any) -> None:
    """Write all of a state that does not grow with the text.

    Raises:
        ValueError: the memory holds numbers that are not finite.
    """
    _save(path, model, without_caches(state))


def save_banks(path: str | Path, model: LanguageModel, state: Any, banks: Sequence[int]) -> None:
    """Write the given banks of every memory layer.

    Raises:
        ValueError: the memory holds numbers that are not finite.
    """
    parts = parts_of(state, MemoryLayerState).values()
    _save(path, model, ExportedBanks(tuple(take_banks(part.memory, banks) for part in parts)))


def load_memory(path: str | Path, model: LanguageModel) -> Any:
    """Return the state that `save_memory` wrote.

    Raises:
        ValueError: the file is of another model, version or content, or damaged; the message names both fingerprints or the reason.
    """
    header = _header(path, model)
    if header["kind"] == ExportedBanks.__name__:
        raise ValueError(
            f"{path}: holds {_count(header)} exported banks, not a whole memory. Allowed: what save wrote. "
            f"Name the banks to put them into: into=[...] of {_count(header)}."
        )
    return _load(path, model.initial_state(1))


def load_banks(path: str | Path, model: LanguageModel) -> tuple[LinearMemory, ...]:
    """Return the banks of every memory layer that a file holds, be it exported banks or a whole memory.

    Raises:
        ValueError: as for `load_memory`.
    """
    header = _header(path, model)
    empty = model.initial_state(1)
    if header["kind"] == ExportedBanks.__name__:
        parts = parts_of(empty, MemoryLayerState).values()
        banks = [0] * _count(header)
        return _load(path, ExportedBanks(tuple(take_banks(part.memory, banks) for part in parts))).memories
    return tuple(part.memory for part in parts_of(_load(path, empty), MemoryLayerState).values())


def _save(path: str | Path, model: LanguageModel, state: State) -> None:
    for name, tensor in tensors_of(state).items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{path}: {name} holds NaN or infinity and is not saved. Allowed: finite numbers. "
                "Reset the session and read the text again; if it comes back, the model's weights are broken."
            )
    first = next(iter(parts_of(state, LinearMemory).values()))
    counters = {name: tensor.tolist() for name, tensor in tensors_of(state).items() if not tensor.is_floating_point()}
    state.save(
        path,
        metadata={
            "contents": CONTENTS,
            "fingerprint": fingerprint(model),
            "memories": json.dumps(_described(model)),
            "banks": str(first.matrix.shape[1]),
            "shapes": describe(state),
            "counters": json.dumps(counters),
        },
    )


def _header(path: str | Path, model: LanguageModel) -> dict[str, str]:
    """Read a file's header and refuse what is not for this model."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: cannot be read as a memory file ({error}). Allowed: a whole file that a session saved. Copy it again."
        ) from error
    if header.get("contents") != CONTENTS:
        raise ValueError(f"{path}: is no memory file. Allowed: a file that a session saved. Check the path.")
    if header.get("format") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: has format version {header.get('format')}. Allowed: {FORMAT_VERSION}. "
            "Save it again with this version of newllm."
        )
    theirs, ours = header["fingerprint"], fingerprint(model)
    if theirs != ours:
        raise ValueError(
            f"{path}: is the memory of model {theirs}, this is model {ours} (other {_difference(header, model)}). "
            "Allowed: memories of the same weights and layers. Load the model that wrote it."
        )
    return header


def _load(path: str | Path, like: Any) -> Any:
    """Read a state and check everything that a later call would trip over."""
    loaded = like.load(path)
    expected = tensors_of(like)
    for name, tensor in tensors_of(loaded).items():
        sizes, wanted = list(tensor.shape), list(expected[name].shape)
        if name.rsplit(".", 1)[-1] in _RAGGED:
            sizes[2] = wanted[2] = 0
        if sizes != wanted or tensor.is_floating_point() != expected[name].is_floating_point():
            raise ValueError(
                f"{path}: {name} has shape {list(tensor.shape)}. Allowed: {list(expected[name].shape)}. Copy the file again."
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity. Allowed: finite numbers. Save the memory again.")
    for name, part in parts_of(loaded, MemoryLayerState).items():
        counted = {"open_lengths": part.keys.shape[2] + 1, "current_bank": len(part.frozen)}
        for counter, limit in counted.items():
            value = getattr(part, counter)[0]
            if not 0 <= value < limit:
                raise ValueError(
                    f"{path}: {name}.{counter} is {value}. Allowed: 0 to {limit - 1}. Copy the file again."
                )
    return loaded


def _count(header: dict[str, str]) -> int:
    return int(header["banks"])


def _described(model: LanguageModel) -> list[dict[str, Any]]:
    """What decides the layout of every memory, so that a refusal can say more than two fingerprints."""
    parts = parts_of(model.initial_state(1), MemoryLayerState)
    return [
        {
            "kernel": memory_layer(model, name).options.memory_kernel,
            "write": part.memory.rule,
            "banks": len(part.frozen),
            "shape": list(part.memory.matrix.shape[2:]),
        }
        for name, part in parts.items()
    ]


def _difference(header: dict[str, str], model: LanguageModel) -> str:
    theirs, ours = json.loads(header["memories"]), _described(model)
    if len(theirs) != len(ours):
        return f"number of memories: {len(theirs)} there, {len(ours)} here"
    for their, our in zip(theirs, ours, strict=True):
        for key, value in our.items():
            if their.get(key) != value:
                return f"{key}: {their.get(key)} there, {value} here"
    return "weights or options"


def _configuration(model: nn.Module) -> dict[str, Any]:
    """Numbers, words and options of every module, by its name: what weights alone do not say."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        facts: dict[str, Any] = {"class": type(module).__name__}
        for key, value in vars(module).items():
            if isinstance(value, bool | int | float | str) and key != "training" and not key.startswith("_"):
                facts[key] = value
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                facts[key] = dataclasses.asdict(value)
        found[name] = facts
    return found
