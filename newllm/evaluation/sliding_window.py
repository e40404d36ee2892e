"""Perplexity with a sliding window, each token scored once."""

from dataclasses import dataclass
from typing import Annotated, Any

from newllm.config.fields import Range
from newllm.config.schema import EvaluationConfig


@dataclass(frozen=True, kw_only=True)
class SlidingWindowConfig(EvaluationConfig):
    """Window and stride."""

    window: Annotated[int | None, Range(minimum=1)]  # tokens; null takes data.block_length
    stride: Annotated[int | None, Range(minimum=1)]  # tokens; null takes a quarter of the window

    def check(self, config: Any) -> list[str]:
        """Return what is wrong between these values."""
        if self.window is None or self.stride is None or self.stride <= self.window:
            return []
        return [
            f"evaluation.sliding_window.stride={self.stride}: leaves tokens out between windows of {self.window}. "
            f"Allowed: 1 to {self.window}. Lower the stride or raise evaluation.sliding_window.window."
        ]
