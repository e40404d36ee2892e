"""What every language model is: a plain module from token ids and a state to logits, hidden states and the next state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from newllm.recurrence import unroll
from newllm.state import State


@dataclass(frozen=True)
class ModelOutput:
    """What a model returns.

    Attributes:
        logits: scores of the next token [B, T, V]; None from `encode`.
        hidden: states [B, T, D] before the final norm: what a feedback model feeds back.
        state: the state after the last token.
    """

    logits: Tensor | None
    hidden: Tensor
    state: Any


class LinearHead(NamedTuple):
    """Scores as one linear map: features [..., F], weight [V, F], and bias [V] or None."""

    features: Tensor
    weight: Tensor
    bias: Tensor | None


class LanguageModel(nn.Module, ABC):
    """A causal language model whose state is a value.

    A subclass sets `vocab_size`, `dim`, `has_feedback` and, where several parameter names stand for one tensor, `tied_parameters`
    (groups of names); it writes `initial_state`, `encode`, `logits` and the two cost formulas.
    In any chunking, token by token included, with the state carried, the result is that of one pass.
    """

    vocab_size: int
    dim: int
    has_feedback: bool = False
    max_positions: int | None = None  # tokens of the longest text; None takes any
    tied_parameters: tuple[tuple[str, ...], ...] = ()

    @property
    def carried_dim(self) -> int:
        """Width of what the next position reads of the last hidden state: so many of its leading dims."""
        return self.dim

    @abstractmethod
    def initial_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Return the empty state of `batch_size` texts; device and dtype are the parameters' unless given."""

    @abstractmethod
    def encode(
        self,
        input_ids: Tensor,
        state: Any,
        *,
        previous_hidden: Tensor | None = None,
        update_memory: bool = True,
        use_feedback: bool = True,
    ) -> ModelOutput:
        """Return hidden states and the next state in one parallel pass; logits are None.

        Args:
            input_ids: tokens [B, T].
            state: what `initial_state` or the previous call returned.
            previous_hidden: for feedback models, the state of the position before each position [B, T, D].
            update_memory: write memories; False reads them only.
            use_feedback: False leaves the fed-back term out, to measure what it is worth; for feedback models.
        """

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Return scores of the next token [..., V] for states [..., D]."""

    def linear_head(self, hidden: Tensor) -> LinearHead | None:
        """Return what `logits` multiplies for states [..., D]; None where scores are no linear map, as they may be.

        A loss over many tokens then makes the scores of a few at a time.
        """
        return None

    @abstractmethod
    def flops_per_token(self, length: int) -> float:
        """Return the matrix FLOPs per token of one forward pass over a text of `length` tokens."""

    def training_flops_per_token(self, length: int) -> float:
        """Return the matrix FLOPs per token of one pass and its gradient: the products of the pass, and two for each of them back.

        A model whose passes do not all carry a gradient, or whose loss reads it more than once, says so here.
        """
        return 3 * self.flops_per_token(length)

    def head_flops_per_token(self) -> float:
        """Return the matrix FLOPs of the scores of one state; 0 where they are no linear map."""
        head = self.linear_head(torch.zeros(1, self.dim, device=next(self.parameters()).device))
        return 0 if head is None else 2 * head.weight.numel()

    @abstractmethod
    def state_bytes(self, length: int) -> int:
        """Return the bytes of one text's state after `length` tokens, in fp32."""

    def forward(
        self,
        input_ids: Tensor,
        state: Any = None,
        *,
        previous_hidden: Tensor | None = None,
        update_memory: bool = True,
    ) -> ModelOutput:
        """Return logits, hidden states and the next state.

        A feedback model without `previous_hidden` runs exactly, one position after another; with it, one parallel sweep.

        Args:
            input_ids: tokens [B, T].
            state: None for the empty state.
            previous_hidden: for feedback models, h_{t-1} for every position [B, T, D].
            update_memory: write memories; False reads them only.
        Raises:
            ValueError: no token, ids on the CPU that are no tokens of the model, another batch size than the state's, or
                `previous_hidden` given to a model without feedback.
        """
        state = self._checked_state(input_ids, state)
        self._check_ids(input_ids)
        if previous_hidden is None:
            output = self.exact(input_ids, state, update_memory=update_memory)
        else:
            self._check_previous(input_ids, previous_hidden)
            output = self.encode(input_ids, state, previous_hidden=previous_hidden, update_memory=update_memory)
        return ModelOutput(self.logits(output.hidden), output.hidden, output.state)

    def exact(self, input_ids: Tensor, state: Any = None, *, update_memory: bool = True) -> ModelOutput:
        """Return hidden states and the next state of the function that is deployed; logits are None.

        Args:
            input_ids: tokens [B, T].
            state: None for the empty state.
            update_memory: write memories; False reads them only.
        Raises:
            ValueError: no token, or another batch size than the state's.
        """
        state = self._checked_state(input_ids, state)
        if not self.has_feedback:
            return self.encode(input_ids, state, update_memory=update_memory)
        hidden, next_state = unroll(self, input_ids, state, update_memory=update_memory)
        return ModelOutput(None, hidden, next_state)

    def _checked_state(self, input_ids: Tensor, state: Any) -> Any:
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ValueError(
                f"input_ids: has shape {list(input_ids.shape)}. Allowed: [B, T], both at least 1. Add what is missing."
            )
        if state is None:
            return self.initial_state(input_ids.shape[0])
        if state.num_rows != input_ids.shape[0]:
            raise ValueError(
                f"state: holds {state.num_rows} texts, input_ids {input_ids.shape[0]}. Allowed: equal numbers. "
                f"Start with model.initial_state(batch_size={input_ids.shape[0]})."
            )
        return state

    def _check_ids(self, input_ids: Tensor) -> None:
        if (
            input_ids.device.type != "cpu" or torch.compiler.is_compiling()
        ):  # a device would be waited for, in every step
            return
        lowest, highest = input_ids.min().item(), input_ids.max().item()
        if input_ids.is_floating_point() or not 0 <= lowest <= highest < self.vocab_size:
            raise ValueError(
                f"input_ids: are {input_ids.dtype} of {lowest} to {highest}. Allowed: integers of 0 to {self.vocab_size - 1}. "
                "Encode the text with the model's own tokenizer."
            )

    def _check_previous(self, input_ids: Tensor, previous_hidden: Tensor) -> None:
        if not self.has_feedback:
            raise ValueError(
                "previous_hidden: was given to a model without feedback. Allowed: None here. "
                "Build the model with feedback=additive or gated."
            )
        if previous_hidden.shape != (*input_ids.shape, self.dim):
            raise ValueError(
                f"previous_hidden: has shape {list(previous_hidden.shape)}. Allowed: {[*input_ids.shape, self.dim]}. "
                "Give the state of the position before each position."
            )


def count_parameters(model: nn.Module) -> dict[str, Any]:
    """Return how many parameters a model has, every shared tensor counted once.

    Returns:
        `total`, `trainable`, and `shared`: lists of names that stand for one tensor.
    """
    names: dict[int, list[str]] = {}
    sizes: dict[int, tuple[int, bool]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # The address tells views of one storage apart from copies; meta tensors have none and are told apart by identity.
        key = id(parameter) if parameter.is_meta else parameter.data_ptr() or id(parameter)
        names.setdefault(key, []).append(name)
        sizes[key] = (parameter.numel(), parameter.requires_grad)
    return {
        "total": sum(size for size, _ in sizes.values()),
        "trainable": sum(size for size, is_trained in sizes.values() if is_trained),
        "shared": sorted(group for group in names.values() if len(group) > 1),
    }
