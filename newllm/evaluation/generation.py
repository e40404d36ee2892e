"""Text the model writes, token by token from its state."""

from dataclasses import dataclass
from typing import Annotated

from newllm.config.fields import Count, Range
from newllm.config.schema import EvaluationConfig


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(EvaluationConfig):
    """Prompt and sampling."""

    prompt: str
    new_tokens: Count
    samples: Count  # texts
    temperature: Annotated[float, Range(minimum=0)]  # 0 takes the likeliest token
    top_p: Annotated[float, Range(above=0, maximum=1)]  # smallest set of tokens with this probability
    seed: Annotated[int, Range(minimum=0)]
