"""Sessions small enough for exact comparison."""

from typing import Any

import torch
from torch import Tensor

from newllm.config.schema import TokenizerConfig
from newllm.data.tokenizer import Tokenizer
from newllm.data.tokenizer_kinds import ready_tokenizer
from newllm.layers.infini import InfiniConfig, InfiniLayer
from newllm.layers.memory_state import MemoryLayerState
from newllm.layers.pythia import PythiaConfig, PythiaLayer
from newllm.models.transformer import TransformerLM
from newllm.session import MemorySession
from newllm.state import State, parts_of, tensors_of

DIM, HEADS, MLP_DIM, SEGMENT = 8, 2, 12, 4
KERNELS = {"elu": "linear", "centred": None, "ridge": None, "delta_token": None}

MEMORY: dict[str, Any] = {
    "segment_length": SEGMENT,
    "memory_heads": 1,
    "memory_kernel": "elu",
    "ridge_penalty": 0.01,
    "write": "linear",
    "local": "linear",
    "mix": "gate",
    "detach_every": None,
    "num_memory_banks": 2,
    "segments_per_bank": 2,
}


def tokenizer() -> Tokenizer:
    """Return the tokenizer whose ids are bytes."""
    found = ready_tokenizer(TokenizerConfig(kind="bytes", vocab_size=None, path=None))
    assert found is not None, "bytes need no training"
    return found


def model(stack: str = "infini pythia", *, feedback: str = "none", seed: int = 1, **memory: Any) -> TransformerLM:
    """Return a stack with every parameter random, so that nothing is hidden by a zero."""
    infini = InfiniConfig(kind="infini", **{**MEMORY, **memory})
    pythia = PythiaConfig(kind="pythia", rotary_share=0.5, rotary_base=10000.0, window=None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [
            InfiniLayer(DIM, HEADS, MLP_DIM, infini) if kind == "infini" else PythiaLayer(DIM, HEADS, MLP_DIM, pythia)
            for kind in stack.split()
        ]
        found = TransformerLM(tokenizer().vocab_size, DIM, layers, feedback=feedback)  # type: ignore[arg-type]
        for parameter in found.parameters():
            parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape)
    return found.eval()


def session(stack: str = "infini pythia", *, chunk_tokens: int = 512, **options: Any) -> MemorySession:
    """Return a session of such a model, with a context of 8 tokens."""
    return MemorySession(model(stack, **options), tokenizer(), context_tokens=8, chunk_tokens=chunk_tokens)


def memories(reader: MemorySession) -> list[MemoryLayerState]:
    """Return the state of every memory layer."""
    return list(parts_of(reader.state, MemoryLayerState).values())


def closed_sums(reader: MemorySession, layer: int = 0) -> list[Tensor]:
    """Return everything a memory layer has summed, over its banks, the open segment included."""
    part = reader.model.layers[layer].close_segment(memories(reader)[layer])  # type: ignore[index,union-attr,operator]
    return [tensor.sum(dim=1) for tensor in tensors_of(part.memory).values()]


def same_bits(first: State, second: State) -> bool:
    """Return whether two states agree to the last bit."""
    own, other = tensors_of(first), tensors_of(second)
    return own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
