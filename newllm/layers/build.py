"""From the names in a stack to layers."""

from __future__ import annotations

import importlib

from newllm.config.schema import LayerConfig, LayersConfig
from newllm.layers.base import Layer


def layer_class(kind: str) -> type[Layer]:
    """Return the layer that newllm/layers/<kind>.py defines."""
    module = importlib.import_module(f"newllm.layers.{kind}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Layer) and value.__module__ == module.__name__
    ]
    assert len(found) == 1, f"newllm/layers/{kind}.py must define one Layer, it defines {len(found)}"
    return found[0]


def build_layer(dim: int, num_heads: int, mlp_dim: int, config: LayerConfig) -> Layer:
    """Return one layer; its constructor takes (dim, num_heads, mlp_dim, config)."""
    return layer_class(config.kind)(dim, num_heads, mlp_dim, config)


def build_stack(config: LayersConfig, dim: int, num_heads: int, mlp_dim: int) -> list[Layer]:
    """Return the layers of a stack, from the bottom."""
    return [build_layer(dim, num_heads, mlp_dim, config.kinds[kind]) for kind in config.stack]
