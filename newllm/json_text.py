"""Values as JSON, which has neither NaN nor infinity."""

import json
import math
from collections.abc import Mapping
from typing import Any


def finite(value: Any) -> Any:
    """Return plain containers in which a number that is not finite is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return a value as JSON that ends in a new line: one line without `indent`."""
    return json.dumps(finite(value), indent=indent, allow_nan=False) + "\n"
