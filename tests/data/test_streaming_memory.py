import pytest

from bench.streaming_memory import ALLOWED, growth, measure


@pytest.mark.slow
def test_more_text_takes_no_more_memory() -> None:
    rows = [measure(megabytes, "tokenised") for megabytes in (3, 12)]
    rows += [measure(60, "read")]

    assert rows[1]["blocks"] > 3.5 * rows[0]["blocks"]
    assert growth(rows) < ALLOWED, rows
