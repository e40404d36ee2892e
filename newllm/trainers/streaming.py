"""Training on texts from beginning to end: the memory is carried from block to block, and empty where a text begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from newllm import ranks
from newllm.config.fields import Count, divisors
from newllm.config.schema import Natural, TrainerConfig
from newllm.evaluation.scoring import Score
from newllm.evaluation.streaming import StreamReading
from newllm.state import from_tensors, merge_rows, tensors_of
from newllm.streaming import begin, check_is_written, read_block
from newllm.trainers.base import Batch, TrainingModule


@dataclass(frozen=True, kw_only=True)
class StreamingConfig(TrainerConfig):
    """Truncated back-propagation through time over the blocks of texts.

    Attributes:
        detach_every: blocks after which the gradient through the carried state is cut; divides accumulate_batches, because
            no gradient can pass a change of the weights.
        context_tokens: tokens of earlier blocks that attention without a window still reaches.
    """

    shares_batches: ClassVar[bool] = True
    reads_in_lanes: ClassVar[bool] = True

    detach_every: Count
    context_tokens: Natural

    def check(self, config: Any) -> list[str]:
        """Return what is wrong between the trainer, the model and the data."""
        problems = []
        if not config.data.needs_tokenizer:
            problems.append(
                f"data={config.data.kind}: gives samples of their own, no texts to read on in. "
                "Allowed with trainer=streaming: sources of text. Choose data=bible, stdlib or jsonl."
            )
        if hasattr(config.model, "max_positions"):
            problems.append(
                f"trainer=streaming: reads texts of any length, a model of kind {config.model.kind} ends at "
                f"model.max_positions={config.model.max_positions}. Allowed: models without last position. Choose model=infini."
            )
        if self.accumulate_batches % self.detach_every:
            problems.append(
                f"trainer.detach_every={self.detach_every}: does not divide trainer.accumulate_batches="
                f"{self.accumulate_batches}; no gradient passes an optimizer step. Allowed: {divisors(self.accumulate_batches)}. "
                "Set trainer.accumulate_batches to a multiple of it."
            )
        return problems


class StreamingModule(TrainingModule):
    """Each block starts from the state after the one before it in the same lane, computed exactly.

    Validation reads its texts in the same way. Beside the deployed function, memory on, stand `val/loss_memory_off` (memories stay
    empty), of the same targets, and `val/loss_other_memory` (another text's memory is read), of the targets for which there was one:
    `val/other_memory_share` of them all. `val/loss_own_memory` is the deployed function's loss on those. Off minus on, and other
    minus own, are what the memory is worth.

    Attributes:
        state: after the last block of every lane; None before the first.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.state: Any = None
        self._blocks_until_detached = 0
        self._reading: StreamReading | None = None

    @property
    def options(self) -> StreamingConfig:
        """The configuration of the procedure."""
        options = self.config.trainer
        assert isinstance(options, StreamingConfig), "built from another trainer's configuration"
        return options

    def start_from(self, state: Any) -> None:
        """Read on from a state; what its frozen banks hold stays for every text.

        Raises:
            ValueError: all banks of a layer are frozen.
        """
        check_is_written(state)
        self.state = state.detach()

    def state_before(self, batch: Batch) -> Any:
        kept = None if self.state is None else self.state.to(batch["input_ids"].device)
        return begin(self.model, kept, batch)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        # Where texts begin decides which rows are emptied, where they end what is counted: to ask the device would wait for all
        # work on it.
        on_host = {name: batch[name] for name in ("starts_text", "is_padding")}
        return {**super().transfer_batch_to_device(batch, device, dataloader_idx), **on_host}

    def states(self, batch: Batch) -> Tensor:
        """Return the hidden states of the next block of every lane, and keep the state after it."""
        self.step_state = state = self.state_before(batch)
        output = read_block(self.model, state, batch["input_ids"], context_tokens=self.options.context_tokens)
        self.state = output.state
        return output.hidden

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        loss = super().training_step(batch, batch_index)
        self._blocks_until_detached = -(batch_index + 1) % self.options.detach_every
        if self._blocks_until_detached == 0:
            self.state = self.state.detach()
        return loss

    def backward(self, loss: Tensor, *_: Any, **__: Any) -> None:
        # The next block's gradient passes through this one's graph once more.
        loss.backward(retain_graph=self._blocks_until_detached > 0)

    def on_train_epoch_end(self) -> None:
        # An epoch may end in the middle of an accumulation; its last batch makes a step all the same.
        self.state = self.state.detach()

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._reading = StreamReading(self.model, context_tokens=self.options.context_tokens)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        assert self._reading is not None, "validation begins with on_validation_epoch_start"
        self.sums.add(batch, batch_index, self._reading.score(batch, self.token_bytes))

    def validation_metrics(self, scores: dict[str, Score]) -> dict[str, float]:
        found = super().validation_metrics(scores)
        if "other_memory" in scores:
            found["val/other_memory_share"] = scores["other_memory"].tokens / scores["exact"].tokens
        return found

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self._reading = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        state = None if self.state is None else _of_all_lanes(self.state.detach().to("cpu"))
        tensors = None if state is None else {name: tensor.clone() for name, tensor in tensors_of(state).items()}
        checkpoint["stream"] = {"rows": 0 if state is None else state.num_rows, "tensors": tensors}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint["stream"]
        if saved["tensors"] is not None:
            state = from_tensors(self.model.initial_state(saved["rows"]), saved["tensors"])
            own = range(ranks.rank(), saved["rows"], ranks.world_size())
            self.state = state if ranks.world_size() == 1 else state.select(list(own))


def _of_all_lanes(state: Any) -> Any:
    """Return the state of one process that reads the lanes of all ranks: lane i is read by rank i % world size."""
    if ranks.world_size() == 1:
        return state
    states = ranks.said_by_all(state)
    num_rows = sum(part.num_rows for part in states)
    return merge_rows([(range(rank, num_rows, ranks.world_size()), part) for rank, part in enumerate(states)])
