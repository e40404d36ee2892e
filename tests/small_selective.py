"""Selective models small enough for exact comparison, every parameter random so that nothing is hidden by a zero."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from newllm.config.compose import compose
from newllm.layers.base import Layer
from newllm.layers.build import layer_class
from newllm.layers.infini import InfiniLayer
from newllm.layers.pythia import PythiaLayer
from newllm.models.base import LanguageModel
from newllm.models.selective import SelectiveLM

DIM, HEADS, MLP_DIM, VOCABULARY, SEGMENT = 8, 2, 12, 11, 3

STACKS = {
    "pythia": ["pythia", "pythia"],
    "window": ["window", "pythia"],
    "infini": ["infini", "pythia"],
    "infini-softmax": ["pythia", "infini-softmax"],
}
SEVERAL_MEMORIES = {"multi_memory": ["multi_memory", "pythia"], "hierarchical": ["hierarchical", "pythia"]}


@cache
def layer_config(kind: str, *changes: str) -> Any:
    """Return the parameters of a kind of layer as conf/ has them, but for some."""
    return compose([f"layers.stack=[{{{kind}: rest}}]", *changes]).layers.kinds[kind]


def layer(kind: str) -> Layer:
    """Return one layer of the kind."""
    if kind in ("pythia", "window"):
        config = layer_config("pythia", "layers.rotary_share=0.5", f"layers.window={4 if kind == 'window' else 'null'}")
        return PythiaLayer(DIM, HEADS, MLP_DIM, config)
    if kind in SEVERAL_MEMORIES:
        config = layer_config(kind, f"layers.segment_length={SEGMENT}", "layers.memory_heads=2")
        return layer_class(kind)(DIM, HEADS, MLP_DIM, config)
    local = "softmax" if kind == "infini-softmax" else "linear"
    config = layer_config("infini", f"layers.segment_length={SEGMENT}", f"layers.local={local}")
    return InfiniLayer(DIM, HEADS, MLP_DIM, config)


def stir(model: LanguageModel) -> LanguageModel:
    """Return the model with every parameter moved away from its start."""
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape)
    return model.eval()


def selective(stack: str, **options: Any) -> SelectiveLM:
    """Return a model with random weights on one of STACKS or SEVERAL_MEMORIES."""
    kinds = {**STACKS, **SEVERAL_MEMORIES}[stack]
    model = SelectiveLM(VOCABULARY, DIM, [layer(kind) for kind in kinds], **options)
    stir(model)
    return model


def tokens(batch_size: int, length: int, seed: int = 0) -> Tensor:
    """Return random token ids [B, T]."""
    return torch.randint(VOCABULARY, (batch_size, length), generator=torch.Generator().manual_seed(seed))
