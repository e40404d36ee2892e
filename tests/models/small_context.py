"""Small context models of every kind, and calls of any length."""

from typing import Any

import torch
from torch import Tensor

from newllm.layers.context_block import initialise
from newllm.models.base import LanguageModel
from newllm.models.context import ContextConfig, ContextLM

VOCABULARY = 13
PLAIN = {
    "dim": 6,
    "context_dim": 4,
    "num_layers": 3,
    "num_input_tokens": 1,
    "ffn_layers": 1,
    "ffn_expand": 2,
    "plan": "E",
    "weight_tying": True,
    "init": "small",
}


def context_config(**options: Any) -> ContextConfig:
    return ContextConfig(kind="context", **PLAIN | options)


def context_model(**options: Any) -> ContextLM:
    """Weights far larger than real ones: so narrow a context forgets within a token otherwise."""
    torch.manual_seed(1)
    model = ContextLM(VOCABULARY, context_config(**options)).eval()
    initialise(model, weight_std=0.7, bias_std=0.1)
    return model


def tokens(batch_size: int, length: int) -> Tensor:
    return torch.randint(VOCABULARY, (batch_size, length), generator=torch.Generator().manual_seed(2))


def in_calls(model: LanguageModel, input_ids: Tensor, length: int) -> tuple[Tensor, Any]:
    """Logits of calls of `length` tokens with the state carried, and the last state."""
    state, logits = model.initial_state(input_ids.shape[0]), []
    for call in input_ids.split(length, dim=1):
        output = model(call, state)
        logits.append(output.logits)
        state = output.state
    return torch.cat(logits, dim=1), state
