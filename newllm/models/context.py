"""ContextLM: a context vector carried from position to position, and a token block that predicts from it.

C: context size. k: token embeddings that enter a position.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from newllm.config.fields import Depth, Range
from newllm.config.schema import ModelConfig
from newllm.layers.context_block import ContextBlock, TokenBlock, initialise
from newllm.linear import Linear, linear
from newllm.models.base import LanguageModel, LinearHead, ModelOutput
from newllm.models.context_state import ContextState, token_window


@dataclass(frozen=True, kw_only=True)
class ContextConfig(ModelConfig):
    """A context block and a token block.

    Attributes:
        dim: width of token embeddings and of the token block's result.
        context_dim: width of the context.
        num_layers: layers of each block.
        num_input_tokens: last tokens that enter a position, its own included.
        ffn_layers: linear maps of each layer's feed-forward part.
        ffn_expand: its inner width over its input's, with two maps.
        plan: which context each token layer reads: its own depth's (E), the last (A), the last in the first layer only (F), or the
            last of the position before in the first and the last of this one in the last layer (G); with one layer these coincide.
            "none" reads no context: a prediction from the last k tokens alone, to compare with.
        weight_tying: scores are products with the token embeddings; otherwise a linear map with a bias.
        init: "small" is N(0, 0.02) without biases; "original" is N(0, 0.1) with biases N(0, 0.01) in the blocks, to reproduce old runs.
    """

    dim: Annotated[int, Range(minimum=1)]
    context_dim: Annotated[int, Range(minimum=1)]
    num_layers: Depth
    num_input_tokens: Annotated[int, Range(minimum=1)]
    ffn_layers: Literal[1, 2]
    ffn_expand: Annotated[int, Range(minimum=1)]
    plan: Literal["A", "E", "F", "G", "none"]
    weight_tying: bool
    init: Literal["small", "original"]

    @property
    def has_feedback(self) -> bool:
        """Whether the last state enters the next position: the context always does."""
        return True

    def is_pointwise(self, layers: Any) -> bool:
        """Whether contexts are made of the context before and tokens alone: always."""
        return True


class ContextLM(LanguageModel):
    """c^1 .. c^L = ContextBlock(c^L of the position before, tokens); scores = head(TokenBlock(tokens, contexts)).

    The states of the recurrence are [c^L; h], C + D wide: the context, which alone is read from the position before, and the token
    block's result, which scores are computed from.

    Args:
        vocab_size: tokens.
        config: sizes and choices.
    """

    has_feedback = True

    def __init__(self, vocab_size: int, config: ContextConfig) -> None:
        super().__init__()
        self.vocab_size, self.config = vocab_size, config
        self.dim, self.context_dim, self.token_dim = config.context_dim + config.dim, config.context_dim, config.dim
        shape = {"num_layers": config.num_layers, "ffn_layers": config.ffn_layers, "ffn_expand": config.ffn_expand}
        self.embedding = nn.Embedding(vocab_size, config.dim)
        self.embedding_norm = nn.LayerNorm(config.dim)
        self.context_block = ContextBlock(config.context_dim, config.dim * config.num_input_tokens, **shape)
        self.token_block = TokenBlock(
            config.context_dim, config.dim, num_input_tokens=config.num_input_tokens, plan=config.plan, **shape
        )
        self.head = None if config.weight_tying else Linear(config.dim, vocab_size)
        initialise(self)
        if config.init == "original":
            initialise(self.context_block, weight_std=0.1, bias_std=0.01)
            initialise(self.token_block, weight_std=0.1, bias_std=0.01)

    @property
    def carried_dim(self) -> int:
        return self.context_dim

    def initial_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> ContextState:
        like = self.embedding.weight.new_empty(0, device=device, dtype=dtype)
        context = like.new_zeros(batch_size, self.context_dim)
        window = like.new_zeros(batch_size, self.config.num_input_tokens - 1, self.token_dim)
        return ContextState(context, window, (0,) * batch_size, self.token_dim)

    def encode(
        self,
        input_ids: Tensor,
        state: ContextState,
        *,
        previous_hidden: Tensor | None = None,
        update_memory: bool = True,
        use_feedback: bool = True,
    ) -> ModelOutput:
        assert previous_hidden is not None, "encode is one sweep: a context model needs the previous states"
        previous_context = previous_hidden[..., : self.context_dim]
        if not use_feedback:
            previous_context = torch.zeros_like(previous_context)
        tokens, window = self.read_tokens(input_ids, state.window)
        contexts = self.context_block(previous_context, tokens=tokens)
        predicting = self.token_block(tokens, contexts=contexts, previous_context=previous_context)
        length = input_ids.shape[1]
        positions = tuple(position + length for position in state.positions)
        next_state = ContextState(contexts[-1][:, -1], window, positions, self.token_dim)
        return ModelOutput(None, torch.cat([contexts[-1], predicting], dim=-1), next_state)

    def logits(self, hidden: Tensor) -> Tensor:
        return linear(*self.linear_head(hidden))

    def linear_head(self, hidden: Tensor) -> LinearHead:
        weight, bias = (self.embedding.weight, None) if self.head is None else (self.head.weight, self.head.bias)
        return LinearHead(hidden[..., self.context_dim :], weight, bias)

    def read_tokens(self, input_ids: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Return what enters every position, normed embeddings of its last k tokens [B, T, k*D], and the last k - 1 of them.

        Args:
            input_ids: tokens [B, T].
            before: normed embeddings of the k - 1 tokens before them; zeros before a text begins.
        """
        return token_window(self.embedding_norm(self.embedding(input_ids)), before)

    def flops_per_token(self, length: int) -> float:
        linears = sum(part.weight.numel() for part in self.modules() if isinstance(part, nn.Linear))
        return 2 * (linears + (self.embedding.weight.numel() if self.head is None else 0))

    def state_bytes(self, length: int) -> int:
        return 4 * (self.context_dim + (self.config.num_input_tokens - 1) * self.token_dim)


def build(config: Any, vocab_size: int) -> ContextLM:
    """Return the model that a configuration describes, with random weights."""
    if config.model.num_layers == 1 and config.model.plan in ("A", "F", "G"):
        warnings.warn(
            f"model.plan={config.model.plan}: with model.num_layers=1 plans A, E, F and G are the same.", stacklevel=2
        )
    return ContextLM(vocab_size, config.model)
