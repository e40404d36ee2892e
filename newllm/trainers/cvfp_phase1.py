"""Phase 1 of CVFP (Context Vector Fixed Point): a context block learns, without targets, contexts that stand still and spread.

N: positions of the training text. C: context size.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from newllm.config.fields import Count, Range, Share
from newllm.config.schema import Natural, TrainConfig, TrainerConfig
from newllm.data.module import TextDataModule
from newllm.data.positions import PositionReading, Positions, positions_of
from newllm.evaluation.context_statistics import ROWS_PER_DIM
from newllm.losses.diversity import DiversityLoss
from newllm.losses.fixed_point import fixed_point_loss, movement
from newllm.models.base import LanguageModel
from newllm.models.context import ContextLM
from newllm.recurrence import sweep
from newllm.trainers.base import Batch, TrainingModule
from newllm.trainers.context_cache import ContextCache
from newllm.trainers.context_report import IterationSums, clean_report, rank_share
from newllm.trainers.context_stream import context_map, on_stream, only_trains, slices, unroll_stream
from newllm.trainers.slice_memory import check_slice

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StreamContextsConfig(TrainerConfig):
    """What all procedures share that keep a context for every position of the training text.

    Attributes:
        slice_tokens: positions that are computed at once.
        reset_at_document: nothing is carried into a text from the one before it.
        tolerance: relative change at which clean sweeps stop, unitless.
        cache: where contexts are kept.
    """

    needs_feedback: ClassVar[bool] = True
    only_model: ClassVar[str | None] = "context"

    slice_tokens: Count
    reset_at_document: bool
    tolerance: Annotated[float, Range(above=0)]
    cache: Literal["disk", "ram"]

    def check(self, config: Any) -> list[str]:
        """Return what is wrong between the trainer and the data."""
        problems = []
        if not config.data.needs_tokenizer:
            problems.append(
                f"data={config.data.kind}: gives samples of their own, no text whose positions follow each other. "
                f"Allowed with trainer={self.kind}: sources of text. Choose data=bible, stdlib or jsonl."
            )
        if not config.embedding.freeze:
            problems.append(
                f"embedding.freeze=false: trainer={self.kind} keeps contexts made over embeddings that stand still. "
                "Allowed: true. Set embedding.freeze=true, or choose trainer=lct."
            )
        if self.accumulate_batches != 1:
            problems.append(
                f"trainer.accumulate_batches={self.accumulate_batches}: trainer={self.kind} decides itself what makes a step. "
                "Allowed: 1. Leave it out; trainer.slice_tokens and trainer.batch_size say how much is computed at once."
            )
        return problems


@dataclass(frozen=True, kw_only=True)
class CvfpPhase1Config(StreamContextsConfig):
    """Iterations: every context once from the one before it in the last iteration, then one optimizer step. A step is an iteration.

    Attributes:
        start: contexts before the first iteration: 0.01 times normal numbers, or those of an exact pass.
        carry_over: what stands before the first position: zeros, or the last context of the iteration before.
        context_noise: standard deviation of normal numbers added to previous contexts in training.
        converged_threshold: mean squared change per iteration below which a context counts as converged.
        stop_at_converged_share: share of converged validation contexts, swept without noise, that ends training; null never does.
        rank_patience: validations without a higher effective rank of validation contexts that end training; null never do.
        min_iterations: before which nothing but the number of steps ends training.
        rank_rows: contexts of which the effective rank is taken, drawn by the seed.
        cache_checkpoint_limit: bytes up to which a checkpoint carries the contexts.
    """

    gives: ClassVar[str] = "contexts"

    start: Literal["noise", "sequential"]
    carry_over: Literal["wrap", "zeros"]
    context_noise: Annotated[float, Range(minimum=0)]
    converged_threshold: Annotated[float, Range(above=0)]
    stop_at_converged_share: Share | None
    rank_patience: Annotated[int | None, Range(minimum=1)]
    min_iterations: Natural
    rank_rows: Count
    cache_checkpoint_limit: Natural

    def check(self, config: Any) -> list[str]:
        """Return also where a validation loss is to end what has none."""
        problems = super().check(config)
        if self.kind == "cvfp_phase1" and self.early_stopping_patience is not None:
            problems.append(
                f"trainer.early_stopping_patience={self.early_stopping_patience}: trainer=cvfp_phase1 has no val/loss. "
                "Allowed: null. Set trainer.rank_patience or trainer.stop_at_converged_share."
            )
        return problems


class CvfpPhase1Module(TrainingModule):
    """Sweeps over the whole text, slice by slice: each context once from that of the position before in the last iteration.

    The loss of a slice is (1 - w) * movement + w * diversity; the gradient goes through one application of the context block and
    no further back. Gradients of all slices make one step, each by its share of the positions; contexts are kept as they were
    computed, before it. Validation sweeps the validation text once from where the last validation left it, without noise. The
    newest weights are the result, with contexts swept clean under them.

    Args:
        model: a context model; only its context block is trained.
        loss: diversity, and its weight w.
        config: the whole configuration.
        token_bytes: UTF-8 bytes of every token [V].
        data: prepared; training reads it slice by slice.
        folder: run folder, for contexts on disk.
    Raises:
        ValueError: contexts or a slice of them do not fit.
    """

    monitor = None
    predicts_tokens = False
    model: ContextLM
    loss: DiversityLoss

    def __init__(
        self,
        model: ContextLM,
        loss: DiversityLoss,
        config: TrainConfig,
        token_bytes: Tensor,
        *,
        data: TextDataModule,
        folder: Path,
    ) -> None:
        super().__init__(model, loss, config, token_bytes)
        only_trains(model, "context_block")
        options = self.options
        k = model.config.num_input_tokens
        reading: dict[str, Any] = {"num_input_tokens": k, "reset_at_text": options.reset_at_document}
        data.read_positions(PositionReading(options.slice_tokens, shuffle=False, held_out=True, **reading))
        self.positions: dict[str, Positions] = {
            "train": positions_of(data.prepared.train, **reading),
            "validation": positions_of(data.prepared.validation, **reading),
        }
        self._tell_sizes()
        paths = {"train": folder / "contexts.bin" if options.cache == "disk" else None, "validation": None}
        self.caches = {
            split: ContextCache.empty(len(positions), model.context_dim, path=paths[split])
            for split, positions in self.positions.items()
        }
        self._has_contexts = False
        self._borders: dict[str, Tensor] = {}
        self._sums = IterationSums()
        self._best_rank = 0.0
        self._validations_since_best = 0
        self._report: dict[str, Any] = {}

    @property
    def options(self) -> CvfpPhase1Config:
        """The configuration of the procedure."""
        options = self.config.trainer
        assert isinstance(options, CvfpPhase1Config), "built from another trainer's configuration"
        return options

    @classmethod
    def positions_per_step(cls, config: TrainConfig, num_positions: int) -> int:
        """All: a step is an iteration."""
        return num_positions

    @classmethod
    def kept_values(cls, model: LanguageModel) -> int:
        """The context."""
        assert isinstance(model, ContextLM), "the schema asks for a context model"
        return model.context_dim

    @property
    def accumulate_batches(self) -> int:
        """Slices of the training text."""
        return -(-len(self.positions["train"]) // self.options.slice_tokens)

    def facts(self) -> dict[str, Any]:
        """Return what the clean contexts of both texts are like; nothing before training has ended."""
        return {"contexts": self._report} if self._report else {}

    def on_train_start(self) -> None:
        if self.trainer.global_step == 0:
            self.begin()
        elif not self._has_contexts:
            self._make_again()

    @torch.no_grad()
    def begin(self) -> None:
        """Give every position its first context."""
        for split, cache in self.caches.items():
            if self.options.start == "noise":
                cache.contexts.copy_(0.01 * torch.randn(cache.contexts.shape))
            else:
                unroll_stream(self.model, self.positions[split], cache, slice_tokens=self.options.slice_tokens)

    def states(self, batch: Batch) -> Tensor:
        """Return the contexts of the training text's next slice [1, n, C], and keep them."""
        return self._sweep(batch, "train", noise=self.options.context_noise)[1]

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        old, new = self._sweep(batch, "train", noise=self.options.context_noise)
        fixed_point, diversity = fixed_point_loss(new, old), self.loss(new[0])
        self._sums.add(new, movement(new, old), diversity, threshold=self.options.converged_threshold)
        if self._sums.positions == len(self.positions["train"]):
            self._end_iteration()
        loss = (1 - self.loss.weight) * fixed_point + self.loss.weight * diversity
        # Lightning takes the mean over slices; the last one may be short, and counts for as much as it holds.
        return loss * (new.shape[1] * self.accumulate_batches / len(self.positions["train"]))

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._validation_sums = IterationSums()

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_index: int) -> None:
        old, new = self._sweep(batch, "validation", noise=0.0)
        self._validation_sums.add(
            new, movement(new, old), self.loss(new[0]), threshold=self.options.converged_threshold
        )

    def on_validation_epoch_end(self) -> None:
        found = {f"{name}_validation": value for name, value in self._validation_sums.metrics().items()}
        ranks = {split: rank_share(cache, self._rows(split)) for split, cache in self.caches.items()}
        found |= {"context/effective_rank": ranks["train"], "context/effective_rank_validation": ranks["validation"]}
        self.log_dict({name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()})
        self._judge_rank(ranks["validation"])
        self._judge_share(found["context/converged_share_validation"])
        if self.stop_reason is not None or self.trainer.global_step >= self.max_steps:
            self._finish()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        contexts = {split: cache.contexts for split, cache in self.caches.items()}
        fits = sum(kept.nbytes for kept in contexts.values()) <= self.options.cache_checkpoint_limit
        checkpoint["contexts"] = {split: kept.clone() for split, kept in contexts.items()} if fits else {}
        checkpoint["rank"] = {"best": self._best_rank, "validations_since": self._validations_since_best}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._best_rank = checkpoint["rank"]["best"]
        self._validations_since_best = checkpoint["rank"]["validations_since"]
        self._has_contexts = bool(checkpoint["contexts"])
        for split, contexts in checkpoint["contexts"].items():
            self.caches[split].contexts.copy_(contexts)

    @torch.no_grad()
    def _make_again(self) -> None:
        """Give every position of a resumed run a context as old as its iterations: zeros would undo them, settled ones end them."""
        made = self.trainer.global_step
        log.warning(
            "the checkpoint carries no contexts (%.2f GiB, above trainer.cache_checkpoint_limit): they are made again by %d "
            "sweeps, as many as there were iterations, with its weights and without noise",
            sum(cache.nbytes for cache in self.caches.values()) / 2**30,
            made,
        )
        for split, positions in self.positions.items():
            self.caches[split].contexts.zero_()  # a file on disk may be of a later iteration
            for _ in range(made):
                for batch in slices(positions, self.options.slice_tokens, device=self.device):
                    self._sweep(batch, split, noise=0.0)

    def _tell_sizes(self) -> None:
        """Say what contexts and slices take, what will be of no effect or of too few; raise where a slice does not fit."""
        options, width = self.options, self.model.context_dim
        total, rows = len(self.positions["train"]), {split: len(self._rows(split)) for split in self.positions}
        log.info(
            "contexts: %s positions x %d values x 4 bytes = %s bytes (%s)",
            *(f"{total:,}", width, f"{total * width * 4:,}", options.cache),
        )
        slice_tokens = min(options.slice_tokens, total)
        check_slice(self.model, slice_tokens, is_trained=True, accelerator=self.config.runtime.accelerator)
        if options.carry_over == "wrap" and options.reset_at_document:
            log.warning(
                "trainer.carry_over=wrap: changes nothing, for the first position begins a text and trainer.reset_at_document=true "
                "carries nothing into it. Set trainer.reset_at_document=false to wrap."
            )
        if min(rows.values()) < ROWS_PER_DIM * width:
            log.warning(
                "context/effective_rank: is taken of %s, fewer than %d for each of %d dims, which hold it down.",
                " and ".join(f"{count:,} {split} contexts" for split, count in rows.items()),
                *(ROWS_PER_DIM, width),
            )

    def _sweep(self, batch: Batch, split: str, *, noise: float) -> tuple[Tensor, Tensor]:
        """Contexts of a slice before and after one sweep, both [1, n, C]; the new ones are kept."""
        cache, positions = self.caches[split], batch["position"]
        old = cache.read(positions, like=next(self.model.parameters()))
        if int(positions[0, 0]) == 0:
            self._borders[split] = self._before_first(split, old)
        step = context_map(self.model, on_stream(batch, self.options.reset_at_document), noise=noise)
        new = sweep(step, old, self._borders[split])
        # Of this iteration's slice, before it is written over: the next slice reads the iteration before.
        self._borders[split] = old[:, -1]
        cache.write(positions, new)
        return old, new

    def _before_first(self, split: str, like: Tensor) -> Tensor:
        if self.options.carry_over == "wrap":
            return self.caches[split].contexts[-1:].to(like)
        return torch.zeros_like(like[:, 0])

    def _end_iteration(self) -> None:
        """Log the iteration whose last slice this is."""
        found = self._sums.metrics()
        self.histograms = {"context/residual": self._sums.histogram()}
        self._sums = IterationSums()
        if self.trainer.global_step == 0:
            # Nothing had been trained yet: from an exact start all contexts stand still, from noise none does.
            found["context/converged_share_untrained"] = found.pop("context/converged_share")
        self.log_dict({name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()})

    def _judge_share(self, share: float) -> None:
        """Judge contexts swept without noise: with it, training's own have a floor of movement."""
        limit, iteration = self.options.stop_at_converged_share, self.trainer.global_step
        if (
            self.stop_reason is None
            and limit is not None
            and share >= limit
            and iteration >= self.options.min_iterations
        ):
            self._stop(f"{share:.1%} of the validation contexts had converged at iteration {iteration}")

    def _judge_rank(self, rank: float) -> None:
        patience, iteration = self.options.rank_patience, self.trainer.global_step
        is_better = rank > self._best_rank
        self._best_rank = max(rank, self._best_rank)
        self._validations_since_best = 0 if is_better else self._validations_since_best + 1
        if patience is None or iteration < self.options.min_iterations or self.stop_reason is not None:
            return
        if self._validations_since_best >= patience:
            self._stop(
                f"the effective rank of validation contexts had not risen for {patience} validations at iteration {iteration}"
            )

    def _stop(self, reason: str) -> None:
        self.stop_reason = reason
        self.trainer.should_stop = True

    def _rows(self, split: str) -> Tensor:
        """The same positions at every look."""
        generator = torch.Generator().manual_seed(self.config.seed)
        return torch.randperm(len(self.positions[split]), generator=generator)[: self.options.rank_rows]

    def _finish(self) -> None:
        """Sweep the contexts of both texts clean: under the last weights, without noise, from nothing at the start."""
        options = self.options
        for split, cache in self.caches.items():
            self._report[split] = clean_report(
                self.model,
                self.positions[split],
                cache,
                self.loss,
                self._rows(split),
                sweeps=self.trainer.global_step,
                slice_tokens=options.slice_tokens,
                threshold=options.converged_threshold,
                tolerance=options.tolerance,
            )
