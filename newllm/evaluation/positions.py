"""Loss by position in the block."""

from dataclasses import dataclass
from typing import Annotated, Any

from newllm.config.fields import Range
from newllm.config.schema import EvaluationConfig


@dataclass(frozen=True, kw_only=True)
class PositionsConfig(EvaluationConfig):
    """Buckets of positions."""

    edges: list[Annotated[int, Range(minimum=0)]]  # first position of each bucket, ascending

    def check(self, config: Any) -> list[str]:
        """Return what is wrong between these values."""
        if self.edges and all(low < high for low, high in zip(self.edges, self.edges[1:], strict=False)):
            return []
        return [
            f"evaluation.positions.edges={self.edges}: is not ascending. "
            "Allowed: at least one position, each above the one before. Sort the list and drop repetitions."
        ]
