import gzip
import random
from pathlib import Path

import pytest
import zstandard

from newllm.data.decompression import CHUNK_BYTES, read_chunks

TEXT = random.Random(0).randbytes(3 * CHUNK_BYTES)  # does not shrink, so that the packed file has several pieces
PACKED = {".gz": gzip.compress(TEXT), ".zst": zstandard.compress(TEXT)}


def unpack(path: Path, packed: bytes) -> bytes:
    path.write_bytes(packed)
    return b"".join(read_chunks(path))


@pytest.mark.parametrize("suffix", PACKED)
def test_packed_text_comes_back(tmp_path: Path, suffix: str) -> None:
    assert unpack(tmp_path / f"a{suffix}", PACKED[suffix]) == TEXT


@pytest.mark.parametrize("suffix", PACKED)
def test_frames_follow_each_other_also_where_pieces_meet(tmp_path: Path, suffix: str) -> None:
    many = {".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    frames = [many(TEXT[: 1000 * number]) for number in range(1, 9)]

    assert unpack(tmp_path / f"a{suffix}", b"".join(frames)) == b"".join(TEXT[: 1000 * n] for n in range(1, 9))


def test_gzip_padded_with_zeros_is_whole(tmp_path: Path) -> None:
    assert unpack(tmp_path / "a.gz", gzip.compress(b"one") + bytes(2 * CHUNK_BYTES)) == b"one"


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("num_bytes", [0, 9, CHUNK_BYTES, 2 * CHUNK_BYTES])
def test_a_file_that_ends_early_is_damaged(tmp_path: Path, suffix: str, num_bytes: int) -> None:
    with pytest.raises(ValueError, match=rf"a{suffix}: is damaged after byte \d+ of its text .* Copy or compress it"):
        unpack(tmp_path / f"a{suffix}", PACKED[suffix][:num_bytes])


@pytest.mark.parametrize("suffix", PACKED)
def test_a_changed_header_is_damage_at_byte_0(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ValueError, match=rf"a{suffix}: is damaged after byte 0 of its text"):
        unpack(tmp_path / f"a{suffix}", b"??" + PACKED[suffix][2:])


def test_a_changed_byte_fails_the_checksum_of_gzip(tmp_path: Path) -> None:
    packed = bytearray(PACKED[".gz"])
    packed[CHUNK_BYTES + 5] ^= 1

    with pytest.raises(ValueError, match=r"a.gz: is damaged after byte \d+ of its text"):
        unpack(tmp_path / "a.gz", bytes(packed))
