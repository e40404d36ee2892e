"""Values against annotations: what is converted, what is refused, what is said to be allowed."""

import math
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from newllm.config.fields import Count, Range, Share, allowed, choices, convert

Words = Literal["additive", "gated", "none"]


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, int, 3),
        (3, float, 3.0),
        (123, str, "123"),
        (None, int | None, None),
        (0, Annotated[int, Range(minimum=0)] | None, 0),
        ("auto", Count | Literal["auto"], "auto"),
        ([1, 2], tuple[int, ...], (1, 2)),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        ("gated", Words, "gated"),
        (object, Any, object),
    ],
)
def test_convert_returns_the_typed_value(value: Any, hint: Any, expected: Any) -> None:
    converted = convert(value, hint)

    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "reason"),
    [
        ("3", int, "is not an integer"),
        (True, int, "is not an integer"),
        (1e4, int, r"is not an integer \(write 10000\)"),
        (1.5, int, "is not an integer"),
        ("x", float, "is not a number"),
        (False, float, "is not a number"),
        (math.nan, float, "is not a finite number"),
        (math.inf, Share, "is not a finite number"),
        (1, bool, "is not true or false"),
        ("yes", bool, "is not true or false"),
        (True, str, "is not a text"),
        (1.5, str, "is not a text"),
        (None, int, "is not an integer"),
        (0, Count, "is out of range"),
        (0, Count | None, "is out of range"),
        (1.01, Share, "is out of range"),
        (1, Annotated[float, Range(below=1)], "is out of range"),
        (0, Annotated[float, Range(above=0)], "is out of range"),
        ("aditive", Words, "is not among the choices"),
        (1.5, Count | Literal["auto"], "is none of what is allowed"),
        (3, list[int], "is not a list"),
        ([1, "x"], list[int], "is not an integer"),
        ([], dict[str, int], "is not a mapping"),
    ],
)
def test_convert_refuses_what_does_not_fit(value: Any, hint: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}"):
        convert(value, hint)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "an integer"),
        (bool, "true, false"),
        (Words, "additive, gated, none"),
        (Count, "an integer at least 1"),
        (Annotated[float | None, Range(above=0)], "a number above 0, or null"),
        (Annotated[float, Range(above=0)] | None, "a number above 0, or null"),
        (Annotated[int, Range(minimum=0, maximum=2**32 - 1)], "an integer at least 0, at most 4294967295"),
        (Count | Literal["auto"], "an integer at least 1, or auto"),
        (list[int], "a list, each an integer"),
        (dict[str, int], "a mapping to an integer"),
        (Any, "any value"),
    ],
)
def test_allowed_says_what_convert_accepts(hint: Any, words: str) -> None:
    assert allowed(hint) == words


def test_choices_are_found_inside_unions() -> None:
    assert choices(Annotated[int | Literal["auto", "all"], Range(minimum=1)]) == ["auto", "all"]
    assert choices(int) == []


bound = st.none() | st.integers(-5, 5)


@given(value=st.integers(-7, 7), minimum=bound, maximum=bound, above=bound, below=bound)
def test_range_holds_every_bound_that_is_given(
    value: int, minimum: int | None, maximum: int | None, above: int | None, below: int | None
) -> None:
    holds = [
        minimum is None or value >= minimum,
        maximum is None or value <= maximum,
        above is None or value > above,
        below is None or value < below,
    ]

    assert (value in Range(minimum, maximum, above, below)) == all(holds)
