"""How a model uses its memories on given texts, measured on demand: nothing of a call is kept in a layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from newllm.layers.memory_layer import MemoryLayer


@torch.no_grad()
def memory_telemetry(model: nn.Module, input_ids: Tensor, state: Any = None) -> dict[str, float]:
    """Return the means over tokens and memory layers of what `MemoryLayer.telemetry` names, as `memory/<name>`.

    With several such layers each one's own means stand beside them, as `memory/<name>_layer_<place in the stack>`. The model is
    measured as it is deployed, in evaluation mode. Empty without such layers.

    Args:
        model: a language model, called once.
        input_ids: tokens [B, T].
        state: the state before them; None for the empty one.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MemoryLayer)}
    if not layers:
        return {}
    calls: dict[str, list[tuple[int, dict[str, float]]]] = {name: [] for name in layers}

    def measure(layer: nn.Module, inputs: tuple[Any, ...], *, name: str) -> None:
        assert isinstance(layer, MemoryLayer)
        told = layer.telemetry(*inputs[:2])
        if told["gate_mean"] == 0:
            del told["gate_mean"]  # a call without a word of the memory is not one in which it weighs nothing
        calls[name].append((inputs[0].shape[1], told))

    hooks = [layer.register_forward_pre_hook(partial(measure, name=name)) for name, layer in layers.items()]
    was_training = model.training
    try:
        model.eval()
        model(input_ids, state)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    means = {name.rsplit(".", 1)[-1]: {"gate_mean": 0.0, **_mean(measured)} for name, measured in calls.items()}
    found = {f"memory/{name}": value for name, value in _mean([(1, mean) for mean in means.values()]).items()}
    if len(means) > 1:
        found |= {
            f"memory/{name}_layer_{place}": value for place, mean in means.items() for name, value in mean.items()
        }
    return found


def _mean(measured: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """The mean of each name over those that have it, weighted: a feedback model calls its layers for one token at a time."""
    names = dict.fromkeys(name for _, facts in measured for name in facts)
    having = {name: [(weight, facts[name]) for weight, facts in measured if name in facts] for name in names}
    return {name: sum(w * value for w, value in of) / sum(w for w, _ in of) for name, of in having.items()}
