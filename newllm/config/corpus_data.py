"""What is chosen about a corpus that may be larger than memory or disk."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from newllm.config.fields import Count
from newllm.config.schema import DataConfig

if TYPE_CHECKING:
    from newllm.config.schema import TrainConfig


@dataclass(frozen=True, kw_only=True)
class CorpusConfig(DataConfig):
    """A corpus: tokenised once and kept on disk, or streamed and never kept."""

    path: str | None  # local file, folder or pattern
    validation: (
        str | None
    )  # documents "first:last" (last excluded), or a file; null chooses by hash of the document's id
    streaming: bool  # read, tokenise and forget while training
    shuffle_buffer: (
        Count  # characters of text whose blocks are mixed, when streaming; each loader process holds as much
    )
    sample_characters: Count  # of training text that trains a tokenizer and gives the entropies, when streaming

    def check(self, config: "TrainConfig") -> list[str]:
        """Return a sentence for each choice that needs to know the whole corpus, where it is streamed."""
        return self._streaming_problems(config) if self.streaming else []

    def _streaming_problems(self, config: "TrainConfig") -> list[str]:
        trainer, problems = config.trainer, []
        if self.max_validation_blocks is None:
            problems.append(
                "data.max_validation_blocks=null: with data.streaming=true all of the corpus would be read before step 0. "
                "Allowed: at least 1. Set data.max_validation_blocks=200."
            )
        if self.max_train_blocks is not None:
            problems.append(
                f"data.max_train_blocks={self.max_train_blocks}: data.streaming=true reads on without an end. "
                "Allowed: null. Leave it out; trainer.max_steps says how much is read."
            )
        if trainer.reads_in_lanes:
            problems.append(
                f"data.streaming=true: trainer={trainer.kind} must know the length of every text. "
                "Allowed with it: false. Leave data.streaming out or choose another trainer."
            )
        if getattr(trainer, "cache", "none") != "none":
            problems.append(
                f"trainer.cache={trainer.cache}: keeps states for a sample's next visit, and data.streaming=true does "  # type: ignore[attr-defined]
                "not know its samples. Allowed with it: none. Set trainer.cache=none or leave data.streaming out."
            )
        return problems
