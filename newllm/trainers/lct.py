"""Lagged Cache Training: a recurrent model trained in parallel, the states of the last visit standing in for the exact ones."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from newllm import ranks
from newllm.config.fields import Range, Sweeps
from newllm.config.problems import listed
from newllm.config.schema import TrainConfig, TrainerConfig
from newllm.models.base import LanguageModel
from newllm.recurrence import solve
from newllm.trainers.base import Batch, TrainingModule
from newllm.trainers.lag import (
    carried_map,
    gradient_cosine,
    lag_statistics,
    newton_to_tolerance,
    sweep_map,
    trained_states,
)
from newllm.trainers.lagged_cache import LaggedCache
from newllm.trainers.sharded_cache import ShardedCache

log = logging.getLogger(__name__)

AUTO_REFERENCE_SWEEPS = 8
AUTO_COSINE = 0.95
# Sweeps, or Newton steps, whose gradient a step's is compared with: the first reach 32 positions back, the second settle within 8.
REFERENCE = {"sweeps": 32, "newton": 8}
UNITS = {"sweeps": "sweeps", "newton": "Newton steps"}
TOLERANCE = 1e-4  # relative change at which states are called settled
# The exact states of a probe are made position by position: a few rows tell as much as a batch.
PROBE_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class LctConfig(TrainerConfig):
    """Lagged Cache Training.

    Attributes:
        solver: what a step makes from the cached states: sweeps, or Newton steps, each of which tells a change to all positions
            after it, and whose gradient reaches over the whole block. They take a model whose positions see earlier states through
            the fed-back one alone, and as many ways back as that state has dims.
        sweeps: K, differentiated sweeps per step, or Newton steps; "auto" raises K until its gradient agrees with that of 8.
        init_sweeps: sweeps without gradient, from zeros, at a sample's first visit.
        cache: where states are kept between visits; "none" starts every batch from zeros.
        cache_dtype: how states are stored.
        cache_checkpoint_limit: bytes up to which a checkpoint carries the cache; above it a resumed run rebuilds it by sweeps.
    """

    shares_batches: ClassVar[bool] = True
    needs_feedback: ClassVar[bool] = True

    solver: Literal["newton", "sweeps"]
    sweeps: Sweeps | Literal["auto"]
    init_sweeps: Sweeps
    cache: Literal["ram", "disk", "none"]
    cache_dtype: Literal["bf16", "fp16", "fp32"]
    cache_checkpoint_limit: Annotated[int, Range(minimum=0)]

    def check(self, config: Any) -> list[str]:
        """Return a sentence for every value that the model or the machine cannot be trained with."""
        if self.solver == "sweeps" or not config.model.has_feedback:
            return []
        if config.model.is_pointwise(config.layers):
            sharded = (
                "runtime.strategy=fsdp: gathers a layer's weights for one way back, trainer.solver=newton takes many. "
            )
            allowed = "Allowed with it: auto, ddp. Choose one of these, or trainer.solver=sweeps."
            return [sharded + allowed] if config.runtime.strategy == "fsdp" else []
        looking = [name for name, kind in config.layers.kinds.items() if kind.looks_back]
        return [
            "trainer.solver=newton: needs positions that are linked by the fed-back state alone, layers of kind "
            f"{listed(looking)} look back at others. Allowed with it: model=context, context_pythia, new_llm, and layers of kind "
            "pythia with layers.window=1. Choose one of these, or trainer.solver=sweeps."
        ]


class LctModule(TrainingModule):
    """One step: gather the cached states, K differentiated sweeps or Newton steps, loss, backward, scatter the new states.

    Args:
        model: a feedback model.
        loss: callable (model, hidden, targets) -> scalar.
        config: the whole configuration.
        token_bytes: UTF-8 bytes of every token [V].
        num_samples: training samples N.
        folder: run folder, for a cache on disk.
    Source: Jacobi iteration spread over visits; K differentiated sweeps from converged states are back-propagation through time
    truncated to K steps.
    """

    def __init__(
        self,
        model: LanguageModel,
        loss: nn.Module,
        config: TrainConfig,
        token_bytes: Tensor,
        *,
        num_samples: int,
        folder: Path,
    ) -> None:
        super().__init__(model, loss, config, token_bytes)
        self.options: LctConfig = config.trainer  # type: ignore[assignment]  # the schema of trainer=lct
        self.sweeps = 1 if self.options.sweeps == "auto" else self.options.sweeps
        self._auto_batch: Batch | None = None
        self.cache: LaggedCache | ShardedCache | None = None
        if self.options.cache != "none":
            sizes = num_samples, config.data.block_length, model.dim
            kind = LaggedCache if ranks.world_size() == 1 else ShardedCache
            self.cache = kind(
                *sizes,
                dtype=self.options.cache_dtype,
                path=folder / "lagged_cache.bin" if self.options.cache == "disk" else None,
                # All machines write to one folder, each has its own RAM.
                sharers=ranks.world_size() if self.options.cache == "disk" else config.runtime.devices,
            )
            if ranks.rank() == 0:
                log.info(
                    "the lagged cache takes %s bytes (trainer.cache=%s)", f"{self.cache.nbytes:,}", self.options.cache
                )

    @classmethod
    def training_flops_per_token(cls, model: LanguageModel, config: TrainConfig) -> float | None:
        """K sweeps with gradient and one scoring; without a cache also the sweeps that every batch starts with.

        Nothing is stated of Newton steps: how much of the model they go back through depends on it.
        """
        options: LctConfig = config.trainer  # type: ignore[assignment]  # the schema of trainer=lct
        if options.sweeps == "auto" or options.solver == "newton":
            return None
        head = model.head_flops_per_token()
        sweep = model.flops_per_token(config.data.block_length) - head
        first = options.init_sweeps if options.cache == "none" else 0
        return (3 * options.sweeps + first) * sweep + 3 * head

    def states(self, batch: Batch) -> Tensor:
        self.step_state = lagged = self.lagged_states(batch)
        states = trained_states(self.model, batch["input_ids"], lagged, sweeps=self.sweeps, solver=self.options.solver)
        if self.cache is not None:
            self.cache.scatter(batch["sample_id"], states)
        return states

    @torch.no_grad()
    def lagged_states(self, batch: Batch) -> Tensor:
        """Return the states [B, T, D] that the next step on the batch starts from."""
        input_ids, sample_ids = batch["input_ids"], batch["sample_id"]
        like = next(self.model.parameters())
        zeros = like.new_zeros(*input_ids.shape, self.model.dim)
        if self.cache is None:
            return self._first_states(input_ids, zeros)
        is_new = ~self.cache.is_visited(sample_ids)
        # Fetching takes all ranks: one whose rows are all new takes part.
        if is_new.all() and ranks.world_size() == 1:
            return self._first_states(input_ids, zeros)
        states = self.cache.gather(sample_ids, device=like.device, dtype=like.dtype)
        if is_new.any():
            rows = is_new.nonzero().squeeze(1).to(states.device)
            states[rows] = self._first_states(input_ids[rows], zeros[rows])
        return states

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        # The cache lies on the host: to ask the device for the ids would wait for all work on it.
        return {**super().transfer_batch_to_device(batch, device, dataloader_idx), "sample_id": batch["sample_id"]}

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        self._auto_batch = {name: tensor[:PROBE_ROWS] for name, tensor in batch.items()}
        return super().training_step(batch, batch_index)

    def probe(self, batch: Batch) -> dict[str, float]:
        """Return also the lag of the cached states before they are used, and what it does to the gradient.

        `lag/relative_error` and its mean over each quarter of the positions, `lag/sweeps_to_tolerance` (1e-4), `lag/contraction`,
        `lag/gradient_cosine` between the K sweeps in use and 32; on at most 8 samples of the batch, the cosine on 2. With Newton
        steps the cosine is to 8 of them, and `lag/newton_to_tolerance` tells how many settle, where no more than 8 do.
        """
        few = {name: tensor[:PROBE_ROWS] for name, tensor in batch.items()}
        lagged = self.lagged_states(few)
        lag = lag_statistics(self.model, few["input_ids"], lagged, tolerance=TOLERANCE)
        two = {name: tensor[:2] for name, tensor in few.items()}
        measured = super().probe(batch) | {
            "lag/relative_error": lag["relative_error"],
            "lag/relative_error_max": lag["relative_error_max"],
            "lag/sweeps_to_tolerance": float(lag["sweeps_to_tolerance"]),
            "lag/gradient_cosine": self._cosine(two, lagged[:2], self.sweeps, reference=REFERENCE[self.options.solver]),
            "lag/sweeps": float(self.sweeps),
        }
        for quarter, errors in enumerate(lag["relative_error_by_position"].chunk(4), start=1):
            measured[f"lag/relative_error_quarter_{quarter}"] = errors.mean().item()
        if lag["contraction"] is not None:
            measured["lag/contraction"] = lag["contraction"]
        if self.options.solver == "newton":
            step, carried = carried_map(self.model, few["input_ids"]), lagged[..., : self.model.carried_dim]
            steps = newton_to_tolerance(step, carried, most=REFERENCE["newton"], tolerance=TOLERANCE)
            if steps is not None:
                measured["lag/newton_to_tolerance"] = float(steps)
        return measured

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.options.sweeps == "auto" and self._auto_batch is not None:
            # Validation runs in inference mode, whose tensors carry no gradient.
            with torch.inference_mode(False):
                self._raise_sweeps(self._auto_batch)

    def _raise_sweeps(self, probe: Batch) -> None:
        """Raise K until the gradient's cosine to that of K = 8 is high enough, and say which K it is."""
        lagged = self.lagged_states(probe)
        while self.sweeps < AUTO_REFERENCE_SWEEPS:
            cosine = self._cosine(probe, lagged, self.sweeps, reference=AUTO_REFERENCE_SWEEPS)
            cosine = sum(ranks.said_by_all(cosine)) / ranks.world_size()  # all ranks make the same sweeps
            if cosine >= AUTO_COSINE:
                log.info(
                    "sweeps=auto: cosine to %d %s is %.3f, K stays %d",
                    *(AUTO_REFERENCE_SWEEPS, UNITS[self.options.solver], cosine, self.sweeps),
                )
                return
            self.sweeps += 1
            log.info(
                "sweeps=auto: cosine to %d %s was %.3f, K is now %d",
                *(AUTO_REFERENCE_SWEEPS, UNITS[self.options.solver], cosine, self.sweeps),
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["sweeps"] = self.sweeps
        if self.cache is not None:
            fits = self.cache.nbytes <= self.options.cache_checkpoint_limit
            checkpoint["lagged_cache"] = self.cache.state_dict(with_states=fits)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.sweeps = checkpoint["sweeps"]
        if self.cache is not None and not self.cache.load_state_dict(checkpoint["lagged_cache"]):
            log.warning(
                "the checkpoint carries no lagged cache (%.2f GiB, above trainer.cache_checkpoint_limit): "
                "every sample's states are rebuilt by %d sweeps at its next visit",
                self.cache.nbytes / 2**30,
                self.options.init_sweeps,
            )

    def _first_states(self, input_ids: Tensor, zeros: Tensor) -> Tensor:
        # From zeros alone the feedback projection would get no gradient during the whole first epoch.
        return solve(sweep_map(self.model, input_ids), zeros, sweeps=self.options.init_sweeps).states

    def _cosine(self, batch: Batch, lagged: Tensor, sweeps: int, *, reference: int) -> float:
        return gradient_cosine(
            self.model,
            self.loss,
            batch["input_ids"],
            batch["labels"],
            lagged,
            sweeps=sweeps,
            reference=reference,
            solver=self.options.solver,
        )
