"""How far lagged states are from the exact ones."""

from dataclasses import dataclass
from typing import Annotated, Any

from newllm.config.fields import Count, Range
from newllm.config.schema import EvaluationConfig


@dataclass(frozen=True, kw_only=True)
class LagConfig(EvaluationConfig):
    """How many sweeps are tried, on how much text."""

    batches: Count
    max_sweeps: Count
    tolerance: Annotated[float, Range(above=0)]  # relative change of the states per sweep

    def check(self, config: Any) -> list[str]:
        """Return what is wrong with this measurement on that model."""
        if config.model.has_feedback:
            return []
        return [
            "evaluation.lag: measures a recurrence, the model has none (model.feedback=none). "
            "Allowed: models with model.feedback=additive or gated. Take lag out of evaluation or train with trainer=lct."
        ]
