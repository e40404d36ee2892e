import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from newllm.data.document import Document
from newllm.data.records import text_form
from newllm.data.text_files import find_files, read_files, split_lines


def read(*files: Path, text_field: str = "text") -> tuple[list[Document], Counter[str]]:
    skipped: Counter[str] = Counter()
    return list(read_files(list(files), text_form(text_field), "made", 0, skipped)), skipped


def texts(*files: Path, text_field: str = "text") -> list[str]:
    return [document.text for document in read(*files, text_field=text_field)[0]]


LINES = '{"text": "one"}\n{"text": "\u00e9t\u00e9", "meta": 3}\n'.encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES),
        ("a.jsonl", LINES.rstrip(b"\n")),
        ("a.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.jsonl.gz", gzip.compress(LINES[:16], mtime=0) + gzip.compress(LINES[16:], mtime=0)),
        ("a.jsonl.zst", zstandard.compress(LINES)),
        ("a.jsonl.zst", zstandard.compress(LINES[:16]) + zstandard.compress(LINES[16:])),
    ],
)
def test_lines_are_read_however_they_are_packed(tmp_path: Path, name: str, content: bytes) -> None:
    file = tmp_path / name
    file.write_bytes(content)

    documents, _ = read(file)

    assert [document.text for document in documents] == ["one", "\u00e9t\u00e9"]
    assert [document.id for document in documents] == [f"{name}:1", f"{name}:2"]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "a.txt.gz"
    file.write_bytes(gzip.compress(b"first line\nsecond"))

    assert texts(file) == ["first line\nsecond"]


def test_rows_of_a_table_are_documents(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": ["one", "two"], "n": [1, 2]}), file)

    assert texts(file, text_field="content") == ["one", "two"]
    with pytest.raises(ValueError, match=r"a.parquet: has no text field text. Allowed: its columns, content, n"):
        read(file)


def test_a_row_without_text_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None]}), file)

    with pytest.raises(ValueError, match=r"a.parquet row 2: has no text in its field text"):
        read(file)


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), file)
    file.write_bytes(file.read_bytes()[:-9])

    with pytest.raises(ValueError, match=r"a.parquet: is damaged or no parquet file"):
        read(file)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"content": "two"}', r"a.jsonl line 2: has no text field text. Allowed: fields with text, here content"),
        (b'{"text": 2, "body": "b"}', r"a.jsonl line 2: has no text in its field text. Allowed: .* here body"),
        (b'["two"]', r"a.jsonl line 2: is not a JSON object"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", r"a.jsonl line 2: cannot be read as JSON \(Exceeds the limit"),
        (b"[" * 100_000, r"a.jsonl line 2: cannot be read as JSON \(maximum recursion depth"),
        (b'{"text": ', r"a.jsonl line 2: is not JSON \(.* at column 10\)"),
        (b'{"text": "\xff"}', r"a.jsonl: is not UTF-8 at byte 26 \(0xff\)"),
    ],
)
def test_a_bad_line_is_named_by_file_and_place(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "one"}\n' + line + b"\n")

    with pytest.raises(ValueError, match=message):
        read(file)


def test_a_bad_byte_behind_a_mark_is_named_by_its_place_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfab\xff")

    with pytest.raises(ValueError, match=r"a.txt: is not UTF-8 at byte 5 \(0xff\)"):
        read(file)


def test_blank_lines_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\n{"text": "one"}\n  \n')

    documents, skipped = read(file)

    assert [document.id for document in documents] == ["a.jsonl:2"]
    assert skipped == {"blank line": 2}


def test_a_folder_gives_its_readable_files_and_counts_the_others(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl", "inner/c.jsonl.zst", "notes.md", "d.parquet.gz"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"")

    files, num_left_out = find_files(str(tmp_path))

    assert [file.relative_to(tmp_path).as_posix() for file in files] == ["a.jsonl", "b.txt", "inner/c.jsonl.zst"]
    assert num_left_out == 2


def test_hidden_files_of_a_folder_are_no_text(tmp_path: Path) -> None:
    for name in ("a.txt", "._a.txt", ".cache/b.txt", "inner/.cache/c.txt", "inner/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    (tmp_path / ".elsewhere.txt").symlink_to(tmp_path / "nothing.txt")

    files, num_left_out = find_files(str(tmp_path))

    assert [file.relative_to(tmp_path).as_posix() for file in files] == ["a.txt", "inner/d.txt"]
    assert num_left_out == 3
    # A folder that is named may be hidden itself.
    assert [file.name for file in find_files(str(tmp_path / ".cache"))[0]] == ["b.txt"]


def test_ids_do_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    for folder in ("here", "there/deep"):
        (tmp_path / folder / "inner").mkdir(parents=True)
        (tmp_path / folder / "inner/a.txt").write_text("one")
        (tmp_path / folder / "b.txt").write_text("two")

    here = read(*find_files(str(tmp_path / "here"))[0])[0]
    there = read(*find_files(str(tmp_path / "there/deep"))[0])[0]

    assert [document.id for document in here] == ["b.txt", "inner/a.txt"] == [document.id for document in there]


def test_a_pattern_gives_its_matches(tmp_path: Path) -> None:
    for name in ("a1.txt", "a2.txt", "b1.txt"):
        (tmp_path / name).write_text("x")

    assert [file.name for file in find_files(str(tmp_path / "a*.txt"))[0]] == ["a1.txt", "a2.txt"]


@pytest.mark.parametrize("name", ["gone.jsonl", "no*.jsonl"])
def test_a_missing_path_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"data.path=.*: does not exist. Allowed: a file, folder or pattern"):
        find_files(str(tmp_path / name))


@pytest.mark.parametrize(("name", "target"), [("books", "there"), ("a.txt", "nowhere.txt")])
def test_a_link_that_would_leave_text_out_is_refused(tmp_path: Path, name: str, target: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here/b.txt").write_text("two")
    (tmp_path / "here" / name).symlink_to(tmp_path / target)

    with pytest.raises(
        ValueError, match=rf"^data\.path=.*/here/{name}: is a link to a (folder|file that is not there)\."
    ):
        find_files(str(tmp_path / "here"))


def test_a_line_costs_its_length_however_many_chunks_it_comes_in() -> None:
    chunks = [b"a"] * 200_000 + [b"b\nc", b"", b"\n\nd"]

    assert [(start, len(line)) for start, line in split_lines(chunks)] == [
        (0, 200_001),
        (200_002, 1),
        (200_004, 0),
        (200_005, 1),
    ]


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"")

    with pytest.raises(ValueError, match=r"is a folder without readable files"):
        find_files(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.jsonl.bz2", r"a compression that is not read \(.bz2\). Allowed: .*\.zst with the package zstandard"),
        ("a.parquet.gz", r"an unknown ending \(.gz\)"),
        ("a.json", r"an unknown ending \(.json\). Allowed: .jsonl, .txt"),
        ("a", r"an unknown ending"),
    ],
)
def test_an_unknown_ending_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"")

    with pytest.raises(ValueError, match=message):
        find_files(str(tmp_path / name))


def test_many_documents_cross_the_read_pieces(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": f"{number} " * 30}) + "\n" for number in range(3000)))

    assert texts(file) == [f"{number} " * 30 for number in range(3000)]
