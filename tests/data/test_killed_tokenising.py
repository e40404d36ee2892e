"""Real tokenising, killed with SIGKILL at any moment or done by two programs at once: the cache is whole or not there."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_texts import BPE, prepared, write_jsonl

TESTS = Path(__file__).parent


def start(corpus: Path) -> subprocess.Popen[str]:
    """Start a program that prepares the corpus and prints the fingerprint of its blocks."""
    program = (
        "from pathlib import Path; from small_texts import BPE, prepared; "
        f"print(prepared(Path({str(corpus)!r}), BPE).fingerprint)"
    )
    return subprocess.Popen([sys.executable, "-c", program], cwd=TESTS, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", 12_000)


@pytest.mark.slow
def test_a_program_killed_while_tokenising_leaves_nothing_in_the_way(corpus: Path, tmp_path: Path) -> None:
    expected = prepared(corpus, BPE, cache_dir=str(tmp_path / "other_cache")).fingerprint
    cache = tmp_path / "cache"
    num_killed = 0
    for seed in range(3):
        program = start(corpus)
        while program.poll() is None and not list(cache.glob("*.tmp-*")):
            time.sleep(0.002)
        time.sleep(random.Random(seed).random() * 0.5)
        program.send_signal(signal.SIGKILL)
        num_killed += program.wait() == -signal.SIGKILL

    found = prepared(corpus, BPE, cache_dir=str(cache)).fingerprint

    assert num_killed > 0
    assert found == expected
    assert not list(cache.glob("*.tmp-*"))


@pytest.mark.slow
def test_two_programs_tokenise_at_once(corpus: Path, tmp_path: Path) -> None:
    programs = [start(corpus) for _ in range(2)]

    fingerprints = {program.communicate(timeout=120)[0] for program in programs}

    assert fingerprints == {prepared(corpus, BPE).fingerprint + "\n"}
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2  # tokenizer and streams
