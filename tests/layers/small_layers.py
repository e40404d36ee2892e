"""Layers small enough for exact comparison, one for each option that changes what a layer computes."""

import importlib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch
import yaml
from torch import Tensor

from newllm.config.kinds import kinds_of, schema_of
from newllm.config.library import conf_folder
from newllm.config.schema import LayerConfig
from newllm.layers.base import Layer
from newllm.layers.build import layer_class

DIM, NUM_HEADS, MLP_DIM = 8, 2, 12
SEGMENT = 4

_MEMORY: dict[str, Any] = {
    "segment_length": SEGMENT,
    "memory_heads": 1,
    "memory_kernel": "elu",
    "ridge_penalty": 0.1,
    "write": "delta",
    "local": "linear",
    "mix": "gate",
    "detach_every": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "pythia": {"rotary_share": 0.5, "rotary_base": 10000.0, "window": None},
    "infini": {**_MEMORY, "num_memory_banks": 1, "segments_per_bank": 2},
    "multi_memory": {**_MEMORY, "memory_heads": 2, "num_memories": 3},
    "hierarchical": {**_MEMORY, "memory_heads": 2, "num_memories": 3, "expand_threshold": None},
}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "pythia": ("pythia", {}),
    "pythia-window": ("pythia", {"window": 3}),
    "infini": ("infini", {}),
    "infini-linear": ("infini", {"write": "linear"}),
    "infini-softmax": ("infini", {"local": "softmax"}),
    "infini-memory-only": ("infini", {"local": "none"}),
    "infini-joint": ("infini", {"mix": "joint", "write": "linear"}),
    "infini-heads-banks": ("infini", {"memory_heads": 2, "num_memory_banks": 3}),
    "infini-joint-banks": ("infini", {"mix": "joint", "num_memory_banks": 2, "segments_per_bank": 1}),
    "infini-centred": ("infini", {"memory_kernel": "centred", "write": None}),
    "infini-ridge": ("infini", {"memory_kernel": "ridge", "write": None, "memory_heads": 2}),
    "infini-ridge-banks": ("infini", {"memory_kernel": "ridge", "write": None, "num_memory_banks": 2}),
    "infini-delta-token": ("infini", {"memory_kernel": "delta_token", "write": None}),
    "infini-delta-token-only": ("infini", {"memory_kernel": "delta_token", "write": None, "local": "none"}),
    "infini-delta-token-banks": ("infini", {"memory_kernel": "delta_token", "write": None, "num_memory_banks": 3}),
    "multi": ("multi_memory", {}),
    "multi-joint": ("multi_memory", {"mix": "joint", "write": "linear"}),
    "multi-centred": ("multi_memory", {"memory_kernel": "centred", "write": None}),
    "multi-ridge": ("multi_memory", {"memory_kernel": "ridge", "write": None}),
    "multi-delta-token": ("multi_memory", {"memory_kernel": "delta_token", "write": None}),
    "hierarchical": ("hierarchical", {}),
    "hierarchical-threshold": ("hierarchical", {"expand_threshold": 0.5}),
    "hierarchical-centred": ("hierarchical", {"memory_kernel": "centred", "write": None}),
    "hierarchical-ridge": ("hierarchical", {"memory_kernel": "ridge", "write": None}),
    "hierarchical-delta-token": ("hierarchical", {"memory_kernel": "delta_token", "write": None}),
}
MEMORY_OPTIONS = [name for name, (kind, _) in OPTIONS.items() if kind != "pythia"]
for _kind in set(kinds_of(LayerConfig)) - set(DEFAULTS):  # a layer added since is tested as conf/ gives it
    _values = yaml.safe_load((conf_folder() / "layers/shared/parameters.yaml").read_text(encoding="utf-8"))
    _own = {field.name for field in fields(schema_of(LayerConfig, _kind))} - {"kind"}
    DEFAULTS[_kind] = {name: _values[name] for name in _own}
    OPTIONS[_kind] = (_kind, {})


def build(name: str, *, dim: int = DIM, mlp_dim: int = MLP_DIM, num_heads: int = NUM_HEADS, **changes: Any) -> Layer:
    """Return a layer with every parameter random, gates and biases too, so that nothing is hidden by a zero."""
    kind, options = OPTIONS[name]
    module = importlib.import_module(f"newllm.layers.{kind}")
    schema = next(
        value
        for key, value in vars(module).items()
        if key.endswith("Config") and getattr(value, "__module__", "") == module.__name__
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layer = layer_class(kind)(
            dim, NUM_HEADS, mlp_dim, schema(kind=kind, **{**DEFAULTS[kind], **options, **changes})
        )
        for parameter in layer.parameters():
            parameter.data = parameter.data + 0.4 * torch.randn(parameter.shape)
    return layer


def texts(batch_size: int, length: int, *, dim: int = DIM, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return random hidden states [B, T, D]."""
    return torch.randn(batch_size, length, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def empty(layer: Layer, batch_size: int, dtype: torch.dtype = torch.float32) -> Any:
    """Return the layer's empty state."""
    return layer.initial_state(batch_size, device=torch.device("cpu"), dtype=dtype)


def in_calls(layer: Layer, hidden: Tensor, lengths: Iterable[int], state: Any = None) -> tuple[Tensor, Any]:
    """Return the layer's output over calls of the given lengths, in tokens, the state carried, and the last state."""
    state = empty(layer, hidden.shape[0], hidden.dtype) if state is None else state
    outputs = []
    for call in hidden.split(list(lengths), dim=1):
        output, state = layer(call, state)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


def projected(layer: Any, hidden: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values [T, H * d] of one text [1, T, D] in a memory layer."""
    return layer.query_key_value(layer.attention_norm(hidden)[0]).chunk(3, dim=-1)
