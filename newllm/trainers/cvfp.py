"""CVFP (Context Vector Fixed Point), both phases in one run: contexts first, then predictions from them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated, ClassVar

from newllm.config.fields import Count, Range
from newllm.config.schema import Natural, TrainConfig
from newllm.models.base import LanguageModel
from newllm.trainers.cvfp_phase1 import CvfpPhase1Config, CvfpPhase1Module
from newllm.trainers.cvfp_phase2 import CvfpPhase2Config, CvfpPhase2Module


@dataclass(frozen=True, kw_only=True)
class CvfpConfig(CvfpPhase2Config, CvfpPhase1Config):
    """Phase 1, then phase 2 over its contexts. Steps, validations and `optimizer` are those of phase 2.

    Attributes:
        max_iterations: optimizer steps of phase 1, at most; 0 leaves the context block untrained.
        validate_every_iterations: of phase 1.
        checkpoint_every_iterations: of phase 1.
        context_lr: learning rate of phase 1.
        context_clip_norm: L2 norm of all gradients of phase 1 together.
    """

    gives: ClassVar[str] = "contexts"

    max_iterations: Natural
    validate_every_iterations: Count
    checkpoint_every_iterations: Count
    context_lr: Annotated[float, Range(above=0)]
    context_clip_norm: Annotated[float | None, Range(above=0)]


class CvfpModule(CvfpPhase2Module):
    """Phase 2 of a run that makes its own phase 1 before, in a folder inside its own.

    The result is that of trainer=cvfp_phase1 and, with its folder, trainer=cvfp_phase2.
    """

    @classmethod
    def kept_values(cls, model: LanguageModel) -> int:
        """Those of both phases."""
        return CvfpPhase1Module.kept_values(model) + super().kept_values(model)

    @property
    def options(self) -> CvfpConfig:
        """The configuration of both phases."""
        options = self.config.trainer
        assert isinstance(options, CvfpConfig), "built from another trainer's configuration"
        return options

    @property
    def trains_contexts(self) -> bool:
        """Whether there is a phase 1."""
        return self.options.max_iterations > 0

    def first_run(self) -> TrainConfig | None:
        if not self.trains_contexts:
            return None
        options = self.options
        shared = {field.name: getattr(options, field.name) for field in fields(CvfpPhase1Config)}
        trainer = CvfpPhase1Config(
            **shared
            | {
                "kind": "cvfp_phase1",
                "max_steps": options.max_iterations,
                "validate_every_steps": options.validate_every_iterations,
                "checkpoint_every_steps": options.checkpoint_every_iterations,
                "log_every_steps": 1,
                "gradient_clip_norm": options.context_clip_norm,
                "early_stopping_patience": None,
            }
        )
        return replace(
            self.config,
            trainer=trainer,
            optimizer=replace(self.config.optimizer, lr=options.context_lr),
            schedule=replace(self.config.schedule, kind="constant", warmup_steps=0),
            evaluation={},
        )
