import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from newllm.data.file_pieces import cut_pieces, file_stream, read_pieces
from newllm.data.records import text_form

TEXT = text_form("text")
LINES = [json.dumps({"text": f"document {number} " + "x" * (number * 7 % 31)}).encode() for number in range(40)]


def read(path: Path, piece_bytes: int = 1 << 24) -> list[dict]:
    return list(read_pieces(cut_pieces([path], piece_bytes), root=path.parent, form=TEXT))


@pytest.mark.parametrize("piece_bytes", [1, 2, 13, 37, 64, 1000, 1 << 24])
@pytest.mark.parametrize("ending", [b"\n", b""])
def test_however_a_file_is_cut_each_line_is_read_once(tmp_path: Path, piece_bytes: int, ending: bytes) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join(LINES) + ending)

    records = read(file, piece_bytes)

    assert [record["text"] for record in records] == [json.loads(line)["text"] for line in LINES]
    assert [record["id"] for record in records] == [record["id"] for record in read(file)]


def test_compressed_lines_have_the_ids_of_plain_ones(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(LINES))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(LINES)))

    plain, packed = (read(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz"))

    assert [r["text"] for r in plain] == [r["text"] for r in packed]
    assert [r["id"].partition("@")[2] for r in plain] == [r["id"].partition("@")[2] for r in packed]


def test_tables_and_texts_are_pieces_as_a_whole(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("three")

    stream = file_stream(str(tmp_path), TEXT, kind="made")

    assert [document.text for document in stream.documents(Counter())] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"txt": "a"}', r"a.jsonl line 31: has no text field text. Allowed: fields with text, here txt"),
        (b'{"text": 3}', r"a.jsonl line 31: has no text in its field text"),
        (b"{", r"a.jsonl line 31: is not JSON"),
        (b'{"text": "\xff"}', r"a.jsonl: is not UTF-8 at byte \d+ \(0xff\)"),
    ],
)
def test_a_bad_line_in_the_middle_of_a_stream_is_named(tmp_path: Path, bad: bytes, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join([*LINES[:30], bad, *LINES[30:]]))

    with pytest.raises(ValueError, match=message):
        read(file, 100)


def test_a_file_cut_in_the_middle_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(b"\n".join(LINES))[:-20])

    with pytest.raises(ValueError, match=r"a.jsonl.gz: is damaged after byte \d+ of its text"):
        read(file)
