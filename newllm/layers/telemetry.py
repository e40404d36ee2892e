"""How a model uses its memories on given texts, measured on demand: nothing of a call is kept in a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from newllm.layers.memory_layer import MemoryLayer


@torch.no_grad()
def memory_telemetry(model: nn.Module, input_ids: Tensor, state: Any = None) -> dict[str, float]:
    """Return the means over tokens and memory layers of what `MemoryLayer.telemetry` names, as `memory/<name>`; empty without such layers.

    Args:
        model: a language model, called once.
        input_ids: tokens [B, T].
        state: the state before them; None for the empty one.
    """
    measured: dict[str, list[tuple[float, int]]] = {}

    def measure(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(layer, MemoryLayer)
        hidden, layer_state = inputs[:2]
        for name, value in layer.telemetry(hidden, layer_state).items():
            measured.setdefault(f"memory/{name}", []).append((value, hidden.shape[1]))

    hooks = [layer.register_forward_pre_hook(measure) for layer in model.modules() if isinstance(layer, MemoryLayer)]
    try:
        if hooks:
            model(input_ids, state)
    finally:
        for hook in hooks:
            hook.remove()
    # A feedback model calls its layers for one token at a time: calls count by their tokens.
    return {
        name: sum(value * tokens for value, tokens in calls) / sum(tokens for _, tokens in calls)
        for name, calls in measured.items()
    }
