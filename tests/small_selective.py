"""Selective models small enough for exact comparison, every parameter random so that nothing is hidden by a zero."""

from typing import Any

import torch
from torch import Tensor

from newllm.layers.infini import InfiniConfig, InfiniLayer
from newllm.layers.pythia import PythiaConfig, PythiaLayer
from newllm.models.base import LanguageModel
from newllm.models.selective import SelectiveLM

DIM, HEADS, MLP_DIM, VOCABULARY, SEGMENT = 8, 2, 12, 11, 3

STACKS = {
    "pythia": ["pythia", "pythia"],
    "window": ["window", "pythia"],
    "infini": ["infini", "pythia"],
    "infini-softmax": ["pythia", "infini-softmax"],
}


def layer(kind: str) -> PythiaLayer | InfiniLayer:
    """Return one layer of the kind."""
    if kind in ("pythia", "window"):
        window = 4 if kind == "window" else None
        return PythiaLayer(
            DIM, HEADS, MLP_DIM, PythiaConfig(kind="pythia", rotary_share=0.5, rotary_base=10000.0, window=window)
        )
    options: dict[str, Any] = {"memory_heads": 1, "memory_kernel": "elu", "write": "delta", "mix": "gate"}
    options |= {"num_memory_banks": 1, "segments_per_bank": 1, "detach_every": None}
    local = "softmax" if kind == "infini-softmax" else "linear"
    return InfiniLayer(DIM, HEADS, MLP_DIM, InfiniConfig(kind="infini", segment_length=SEGMENT, local=local, **options))


def stir(model: LanguageModel) -> LanguageModel:
    """Return the model with every parameter moved away from its start."""
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape)
    return model.eval()


def selective(stack: str, **options: Any) -> SelectiveLM:
    """Return a model with random weights on one of STACKS."""
    model = SelectiveLM(VOCABULARY, DIM, [layer(kind) for kind in STACKS[stack]], **options)
    stir(model)
    return model


def tokens(batch_size: int, length: int, seed: int = 0) -> Tensor:
    """Return random token ids [B, T]."""
    return torch.randint(VOCABULARY, (batch_size, length), generator=torch.Generator().manual_seed(seed))
