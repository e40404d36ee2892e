"""What a measurement works on: a run's model, the batches of one split, and how text is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from newllm.data.module import TextDataModule, build_data
from newllm.data.tokenizer import Tokenizer
from newllm.load import LoadedRun
from newllm.models.base import LanguageModel

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Material:
    """A model and the text to measure it on.

    Attributes:
        run: the run it comes from.
        data: the run's data, prepared.
        split: the text that is measured.
    """

    run: LoadedRun
    data: TextDataModule
    split: Split

    @classmethod
    def of(cls, run: LoadedRun, *, split: Split, batch_size: int | None) -> Material:
        """Return the material of a run; `batch_size` None takes the run's own."""
        if batch_size is None:
            return cls(run, run.data, split)
        config = dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, eval_batch_size=batch_size))
        data = build_data(config, tokenizer_file=run.tokenizer_file)
        data.prepare()
        return cls(run, data, split)

    @property
    def model(self) -> LanguageModel:
        """The model, in evaluation mode."""
        return self.run.model

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The run's tokenizer; None where its data are token ids."""
        return self.data.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Yield the split's batches on the model's device, in order."""
        loader = self.data.val_dataloader() if self.split == "validation" else self.data.test_dataloader()
        for batch in loader:
            yield {name: tensor.to(self.device) for name, tensor in batch.items()}
