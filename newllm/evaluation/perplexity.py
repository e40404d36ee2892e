"""Loss, perplexity, bits per byte and accuracy over every target once."""

from dataclasses import dataclass

from newllm.config.schema import EvaluationConfig


@dataclass(frozen=True, kw_only=True)
class PerplexityConfig(EvaluationConfig):
    """What stands beside the perplexity."""

    compare_compressors: bool  # bits per byte of xz -9 and zstd -19 on the same text
