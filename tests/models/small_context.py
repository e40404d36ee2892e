"""Small recurrent models of contexts, one for each option that changes what a model computes, and calls of any length."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from newllm.layers.context_block import initialise
from newllm.layers.pythia import PythiaConfig, PythiaLayer
from newllm.models.base import LanguageModel
from newllm.models.context import ContextConfig, ContextLM
from newllm.models.context_pythia import ContextPythia, ContextPythiaConfig
from newllm.models.new_llm import NewLlm, NewLlmConfig

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
NEW_LLM = {"dim": 6, "context_dim": 4, "hidden_dim": 10, "num_layers": 2, "num_positions": 5, "update": "gated"}
PYTHIA = {
    "dim": 12,
    "context_dim": 8,
    "width": "context",
    "num_layers": 2,
    "num_heads": 2,
    "mlp_dim": 14,
    "context_layers": 2,
    "ffn_layers": 1,
    "ffn_expand": 2,
}


def context_config(**options: Any) -> ContextConfig:
    return ContextConfig(kind="context", **PLAIN | options)


def context_model(**options: Any) -> ContextLM:
    return _wide(lambda: ContextLM(VOCABULARY, context_config(**options)))


def new_llm(**options: Any) -> NewLlm:
    return _wide(lambda: NewLlm(VOCABULARY, NewLlmConfig(kind="new_llm", **NEW_LLM | options)))


def context_pythia(**options: Any) -> ContextPythia:
    config = ContextPythiaConfig(kind="context_pythia", **PYTHIA | options)
    attention = PythiaConfig(kind="pythia", rotary_share=0.5, rotary_base=10000.0, window=None)

    def build() -> ContextPythia:
        layers = [
            PythiaLayer(config.layer_width, config.num_heads, config.mlp_dim, attention)
            for _ in range(config.num_layers)
        ]
        return ContextPythia(VOCABULARY, config, layers)

    return _wide(build)


def _wide(build: Callable[[], Any]) -> Any:
    """Weights far larger than real ones: so narrow a context forgets within a token otherwise."""
    torch.manual_seed(1)
    model = build().eval()
    initialise(model, weight_std=0.7, bias_std=0.1)
    return model


MODELS: dict[str, Callable[[], LanguageModel]] = {
    **{f"context-{plan}": lambda plan=plan: context_model(plan=plan) for plan in "AEFG"},
    "context-window": lambda: context_model(num_input_tokens=3),
    "context-window-G-deep": lambda: context_model(num_input_tokens=2, plan="G", ffn_layers=2),
    "context-untied": lambda: context_model(weight_tying=False),
    "context-one-layer": lambda: context_model(num_layers=1),
    **{
        f"new_llm-{update}": lambda update=update: new_llm(update=update)
        for update in ("additive", "convex", "dual", "ema", "gated", "layernorm")
    },
    "new_llm-no-positions": lambda: new_llm(num_positions=None),
    "context_pythia-context": context_pythia,
    "context_pythia-model": lambda: context_pythia(width="model"),
    "context_pythia-deep": lambda: context_pythia(ffn_layers=2, context_dim=None),
}


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
