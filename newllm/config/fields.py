"""What a configuration value may be: type, range and choices, read from the annotation of a schema's field."""

import math
import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin


@dataclass(frozen=True)
class Range:
    """Numbers a field accepts; every bound that is given must hold.

    Attributes:
        minimum: smallest number, itself allowed.
        maximum: largest number, itself allowed.
        above: lower bound, itself not allowed.
        below: upper bound, itself not allowed.
    """

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        bounds = (
            ("at least", self.minimum),
            ("above", self.above),
            ("at most", self.maximum),
            ("below", self.below),
        )
        return ", ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)


Count = Annotated[int, Range(minimum=1)]
"""A number of things of which there is at least one."""
LARGEST_INTEGER = 2**53  # exact in every JSON reader, and some times it still fits into 64 bits
LARGEST_DIVISOR = 4096  # to look for more of them would take longer than the answer is worth
MAX_DEPTH = 1000
Depth = Annotated[int, Range(minimum=1, maximum=MAX_DEPTH)]
"""How often something is stacked or gone over for every token: the deepest published models have a thousand layers."""
Sweeps = Annotated[int, Range(minimum=1, maximum=2**16)]
"""As many as a block has positions are exact: more than the longest blocks have only take time."""
Share = Annotated[float, Range(minimum=0, maximum=1)]
"""A part of a whole, 0 to 1."""


def divisors(whole: int) -> str:
    """Return in words the numbers up to LARGEST_DIVISOR that divide a whole."""
    return ", ".join(str(number) for number in range(1, min(whole, LARGEST_DIVISOR) + 1) if whole % number == 0)


def not_dividing(key: str, parts: int, whole_key: str, whole: int) -> list[str]:
    """Return what is wrong with a number of parts that must divide a width; nothing where it does."""
    if whole % parts == 0:
        return []
    return [
        f"{key}={parts}: does not divide {whole_key}={whole}. Allowed: {divisors(whole)}. "
        f"Set {key} to one of these or change {whole_key}."
    ]


_NAMES = {int: "an integer", float: "a number", bool: "true, false", str: "a text", type(None): "null"}
_NOT = {
    int: "is not an integer",
    float: "is not a number",
    bool: "is not true or false",
    str: "is not a text (where it is meant as one: quotes within quotes, \"key='value'\")",
}


def convert(value: Any, hint: Any) -> Any:
    """Return the value as the annotation types it: an int where a float is asked becomes one, a list a tuple.

    A text is never read as a number.

    Args:
        value: plain value out of YAML or the command line.
        hint: annotation of the field: int, float, bool, str, Literal, Annotated with Range, list, tuple, dict, unions.
    Raises:
        ValueError: the value does not fit; the message is the end of a sentence that begins with the key.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        return _in_range(convert(value, arguments[0]), arguments[1:])
    if origin in (Union, types.UnionType):
        return _first_fitting(value, arguments)
    if origin is Literal:
        return _choice(value, arguments)
    if origin in (list, tuple):
        return _sequence(value, origin, arguments[0])
    if origin is dict:
        return _mapping(value, *arguments)
    return _scalar(value, hint)


def allowed(hint: Any) -> str:
    """Return in words what the annotation accepts, as it stands after `Allowed:`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = ", ".join(str(extra) for extra in arguments[1:] if isinstance(extra, Range))
        inner = [part for part in _members(arguments[0]) if part is not type(None)]
        words = f"{' or '.join(allowed(part) for part in inner)} {bounds}"
        return words if type(None) not in _members(arguments[0]) else f"{words}, or null"
    if origin in (Union, types.UnionType):
        words = ", or ".join(allowed(part) for part in arguments if part is not type(None))
        return words if type(None) not in arguments else f"{words}, or null"
    if origin is Literal:
        return ", ".join(sorted(str(choice) for choice in arguments))
    if origin in (list, tuple):
        return f"a list, each {allowed(arguments[0])}"
    if origin is dict:
        return f"a mapping to {allowed(arguments[1])}"
    return _NAMES.get(hint, "any value")


def choices(hint: Any) -> list[str]:
    """Return the words the annotation accepts (its Literals), from which a closest match can be named."""
    if get_origin(hint) is Literal:
        return [str(choice) for choice in get_args(hint)]
    if get_origin(hint) in (Annotated, Union, types.UnionType):
        return [word for part in get_args(hint) for word in choices(part)]
    return []


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _scalar(value: Any, hint: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and is_number:
        if not math.isfinite(value):
            raise ValueError("is not a finite number")
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        raise ValueError(f"is not an integer (write {value:.0f})")
    if hint is int and is_number and isinstance(value, int):
        if abs(value) > LARGEST_INTEGER:
            raise ValueError(f"is not an integer up to {LARGEST_INTEGER}")
        return value
    if hint is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # a folder may be called 123: YAML reads a number there
    if hint in (bool, str, type(None)) and isinstance(value, hint):
        return value
    raise ValueError(_NOT.get(hint, "does not fit"))


def _in_range(value: Any, extras: tuple[Any, ...]) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and any(isinstance(extra, Range) and value not in extra for extra in extras):
        raise ValueError("is out of range")
    return value


def _first_fitting(value: Any, hints: tuple[Any, ...]) -> Any:
    if value is None and type(None) in hints:
        return None
    reasons = []
    for hint in (hint for hint in hints if hint is not type(None)):
        try:
            return convert(value, hint)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(reasons[0] if len(reasons) == 1 else "is none of what is allowed")


def _choice(value: Any, words: tuple[Any, ...]) -> Any:
    for word in words:
        if type(word) is type(value) and word == value:
            return word
    raise ValueError("is not among the choices")


def _sequence(value: Any, kind: type, hint: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise ValueError("is not a list")
    return kind(convert(element, hint) for element in value)


def _mapping(value: Any, key_hint: Any, value_hint: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError("is not a mapping")
    return {convert(key, key_hint): convert(element, value_hint) for key, element in value.items()}
