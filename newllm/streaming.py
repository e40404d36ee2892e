"""Reading texts in lanes, block after block: the state goes on from batch to batch, and begins anew in a row where a text does.

The same few steps are made in training, in validation and in evaluation.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from newllm.layers.memory_state import MemoryLayerState
from newllm.models.base import LanguageModel, ModelOutput
from newllm.reading import forget
from newllm.state import parts_of

Batch = dict[str, Tensor]


def begin(model: LanguageModel, state: Any, batch: Batch) -> Any:
    """Return the state that the rows of a batch go on from, empty where a text begins.

    Rows that are missing have ended; rows that are new begin a text. Frozen banks keep what they hold.

    Args:
        model: the reader.
        state: after the batch before; None before the first.
        batch: rows are lanes; `starts_text` [B, T].
    """
    starts_B = batch["starts_text"][:, 0]
    num_rows = len(starts_B)
    if state is None:
        return model.initial_state(num_rows)
    if state.num_rows != num_rows:
        assert bool(starts_B[state.num_rows :].all()), "a new row goes on with a text that another row has begun"
        state = state.select([row % state.num_rows for row in range(num_rows)])
    return state.reset(starts_B)


def read_block(
    model: LanguageModel, state: Any, input_ids: Tensor, *, context_tokens: int, update_memory: bool = True
) -> ModelOutput:
    """Return hidden states of the deployed function, and the state for the next block; logits are None.

    Attention without a window would reach back to the beginning of the text; between blocks it forgets all but a few tokens.

    Args:
        model: the reader.
        state: what `begin` returned.
        input_ids: the block [B, T].
        context_tokens: tokens before a block that such attention still reaches.
        update_memory: write memories.
    """
    output = model.exact(input_ids, state, update_memory=update_memory)
    return ModelOutput(None, output.hidden, forget(model, output.state, context_tokens))


def check_is_written(state: Any) -> None:
    """Check that reading on can change the memory.

    Raises:
        ValueError: all banks of a layer are frozen.
    """
    for name, part in parts_of(state, MemoryLayerState).items():
        if all(part.frozen):
            count = len(part.frozen)
            which = "the only bank is" if count == 1 else f"all {count} banks are"
            raise ValueError(
                f"{name}: {which} frozen, so streaming would write nothing. Allowed: at least one open bank. "
                "Unfreeze one, or give the model more with layers.num_memory_banks."
            )
