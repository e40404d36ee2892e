import pytest

from bench import tokenising


@pytest.mark.timing
def test_tokenising_to_disk_keeps_up_with_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine tenths of `encode_batch`, which gives no ids yet: reading them, hashes, checks and the file are the rest."""
    whole = tokenising.corpus()
    monkeypatch.setattr(tokenising, "corpus", lambda: whole[::4])

    found = tokenising.run(quick=False).figures["newllm_throughput_over"]

    assert found["tokenizers, encode_batch"] >= 0.9, found
