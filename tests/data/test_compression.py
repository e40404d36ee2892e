import lzma
import random
import shutil
import subprocess

import pytest

from newllm.data.compression import compressed_bits_per_byte


def test_bits_per_byte_of_incompressible_text_are_eight() -> None:
    bits = compressed_bits_per_byte(random.Random(0).randbytes(100_000))

    assert bits == {"xz": pytest.approx(8, abs=0.01), "zstd": pytest.approx(8, abs=0.01)}


@pytest.mark.skipif(shutil.which("xz") is None, reason="needs the program xz")
def test_xz_is_as_small_as_the_program_makes_it() -> None:
    text = b"in the beginning " * 500

    program = subprocess.run(["xz", "-9e", "--stdout"], input=text, capture_output=True, check=True).stdout

    # headers of the two may differ by some bytes
    assert compressed_bits_per_byte(text)["xz"] * len(text) / 8 == pytest.approx(len(program), abs=16)
    assert lzma.decompress(program) == text


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got a text of 0 bytes. Allowed: at least 1"):
        compressed_bits_per_byte(b"")
