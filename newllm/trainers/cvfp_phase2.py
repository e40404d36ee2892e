"""Phase 2 of CVFP (Context Vector Fixed Point): a token block learns to predict from contexts that stand still.

N: positions of the training text. L: layers. C: context size. k: last tokens of a position.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from newllm.config.fields import Count, Range
from newllm.config.first_phase import UNTRAINED
from newllm.config.schema import TrainConfig
from newllm.data.module import TextDataModule
from newllm.data.positions import PositionReading, positions_of
from newllm.losses.next_token import NextTokenConfig, NextTokenLoss
from newllm.models.base import LanguageModel
from newllm.models.context import ContextLM
from newllm.trainers.base import Batch, TrainingModule
from newllm.trainers.batch_size import automatic_batch_size
from newllm.trainers.context_cache import ContextCache, check_room
from newllm.trainers.context_stream import fill_layers, only_trains, read_tokens, settle, unroll_stream
from newllm.trainers.cvfp_phase1 import StreamContextsConfig
from newllm.trainers.first_phase import FirstPhase, read_first_phase
from newllm.trainers.slice_memory import check_slice

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CvfpPhase2Config(StreamContextsConfig):
    """Next-token training of the token block on single positions, shuffled, over contexts made once.

    Attributes:
        contexts: made by parallel sweeps to the tolerance, or exactly, position by position.
        phase1: run folder of the phase 1 whose context block and contexts are taken; "untrained" leaves the block as it is drawn.
        batch_size: positions of an optimizer step; "auto" takes what the memory allows.
        epochs: visits of every position, at most; max_steps holds as well. null is without limit.
    """

    contexts: Literal["exact", "parallel"]
    phase1: str | None
    batch_size: Count | Literal["auto"]
    epochs: Annotated[int | None, Range(minimum=1)]

    def check(self, config: Any) -> list[str]:
        """Return also where there is no phase 1."""
        problems = super().check(config)
        if self.kind == "cvfp_phase2" and self.phase1 is None:
            problems.append(
                "trainer.phase1=null: phase 2 needs the context block of a phase 1. Allowed: a run folder of "
                "trainer=cvfp_phase1 or cvfp, or untrained. Set trainer.phase1 to one, or choose trainer=cvfp."
            )
        return problems


class CvfpPhase2Module(TrainingModule):
    """Positions in any order, each with the contexts of all layers out of a cache: nothing of the recurrence is computed in a step.

    The context block and the embedding stand still. Validation is the deployed function, as everywhere: the exact recurrence.

    Args:
        model: a context model; its token block and an untied head are trained.
        loss: callable (model, hidden, targets) -> scalar; not used where the configuration's is that of phase 1.
        config: the whole configuration.
        token_bytes: UTF-8 bytes of every token [V].
        data: prepared; training reads its positions.
        folder: run folder, for contexts on disk.
    Raises:
        ValueError: contexts or a slice of them do not fit, or phase 1 is missing or of another model or text.
    """

    model: ContextLM

    def __init__(
        self,
        model: ContextLM,
        loss: nn.Module,
        config: TrainConfig,
        token_bytes: Tensor,
        *,
        data: TextDataModule,
        folder: Path,
    ) -> None:
        if config.loss.reads != "states":
            loss = NextTokenLoss(NextTokenConfig(kind="next_token"))
        super().__init__(model, loss, config, token_bytes)
        only_trains(model, "token_block", "head")
        self.data, self.folder = data, folder
        reading: dict[str, Any] = {
            "num_input_tokens": model.config.num_input_tokens,
            "reset_at_text": self.options.reset_at_document,
        }
        self.positions = positions_of(data.prepared.train, **reading)
        self.batch_size = self._batch_size()
        data.read_positions(PositionReading(self.batch_size, shuffle=True, held_out=False, **reading))
        self.cache: ContextCache | None = None
        check_room(len(self.positions), self.kept_values(model), self._path)
        check_slice(
            model,
            min(self.options.slice_tokens, len(self.positions)),
            is_trained=self.trains_contexts,
            accelerator=config.runtime.accelerator,
        )
        self.first_phase: FirstPhase | None = None
        if self.options.phase1 not in (None, UNTRAINED):
            self.take(Path(str(self.options.phase1)))

    @property
    def options(self) -> CvfpPhase2Config:
        """The configuration of the procedure."""
        options = self.config.trainer
        assert isinstance(options, CvfpPhase2Config), "built from another trainer's configuration"
        return options

    @property
    def max_steps(self) -> int:
        """`trainer.max_steps`, or fewer where every position has been visited `trainer.epochs` times."""
        most, epochs = self.options.max_steps, self.options.epochs
        steps_per_epoch = -(-len(self.positions) // self.batch_size)
        return most if epochs is None else min(most, epochs * steps_per_epoch)

    @classmethod
    def positions_per_step(cls, config: TrainConfig, num_positions: int) -> int | None:
        """`trainer.batch_size`."""
        options = config.trainer
        assert isinstance(options, CvfpPhase2Config), "built from another trainer's configuration"
        return None if options.batch_size == "auto" else min(options.batch_size, num_positions)

    @classmethod
    def kept_values(cls, model: LanguageModel) -> int:
        """The contexts of all layers."""
        assert isinstance(model, ContextLM), "the schema asks for a context model"
        return model.config.num_layers * model.context_dim

    @property
    def trains_contexts(self) -> bool:
        """Whether this run makes the contexts that it builds on."""
        return False

    def take(self, folder: Path) -> None:
        """Take the context block of a phase 1, and its contexts with it.

        Raises:
            ValueError: there is no such run, or it is of another model or text.
        """
        self.first_phase = read_first_phase(folder, self.config, self.data, self.model)
        self.model.context_block.load_state_dict(self.first_phase.context_block)

    def facts(self) -> dict[str, Any]:
        """Return what was taken from phase 1."""
        return {"phase1": UNTRAINED if self.first_phase is None else self.first_phase.facts}

    @torch.no_grad()
    def on_fit_start(self) -> None:
        if self.cache is None:
            self.cache = self._filled()

    def states(self, batch: Batch) -> Tensor:
        """Return the states [1, n, C + D] of n positions, from their contexts in the cache."""
        assert self.cache is not None, "the fit starts by filling the cache"
        tokens, like = read_tokens(self.model, batch), next(self.model.parameters())
        contexts = self.cache.read(batch["position"], like=like).split(self.model.context_dim, dim=-1)
        predicting = self.model.token_block(tokens, contexts=contexts, previous_context=self._previous(batch, contexts))
        return torch.cat([contexts[-1], predicting], dim=-1)

    def _previous(self, batch: Batch, contexts: tuple[Tensor, ...]) -> Tensor:
        """The last layer's context of the position before each; zeros where nothing is before."""
        assert self.cache is not None, "the fit starts by filling the cache"
        if self.model.config.plan != "G":
            return contexts[-1]  # no other plan reads it
        before = self.cache.read((batch["position"] - 1).clamp_min(0), like=contexts[-1])
        return before[..., -self.model.context_dim :].masked_fill(batch["starts_text"].unsqueeze(-1), 0.0)

    def _filled(self) -> ContextCache:
        """The contexts of all layers of every position [N, L*C]."""
        options, model, first = self.options, self.model, self.first_phase
        log.info(
            "contexts: %s positions x %d layers x %d values x 4 bytes = %s bytes (%s)",
            *(f"{len(self.positions):,}", model.config.num_layers, model.context_dim),
            *(f"{len(self.positions) * self._width * 4:,}", options.cache),
        )
        cache = ContextCache.empty(len(self.positions), self._width, path=self._path)
        last = cache.last(model.context_dim)
        if options.contexts == "exact":
            unroll_stream(model, self.positions, last, slice_tokens=options.slice_tokens)
        elif first is not None and first.contexts is not None:
            last.contexts.copy_(first.contexts)
        else:
            last.contexts.zero_()
            settle(model, self.positions, last, slice_tokens=options.slice_tokens, tolerance=options.tolerance)
        if model.config.num_layers > 1:
            fill_layers(model, self.positions, cache, slice_tokens=options.slice_tokens)
        return cache

    @property
    def _width(self) -> int:
        return self.model.config.num_layers * self.model.context_dim

    @property
    def _path(self) -> Path | None:
        return self.folder / "layer_contexts.bin" if self.options.cache == "disk" else None

    def _batch_size(self) -> int:
        if self.options.batch_size != "auto":
            return self.options.batch_size
        return automatic_batch_size(self.model.vocab_size, self.config.runtime.accelerator)
