"""Documents of local files: .jsonl, .parquet (one per row) and .txt (one per file), .jsonl and .txt also as .gz or .zst."""

import codecs
import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from newllm.data.decompression import DECOMPRESSORS, OTHER_COMPRESSIONS, read_chunks
from newllm.data.document import Document
from newllm.data.records import RecordForm

READABLE = (".jsonl", ".txt", ".parquet")
ALLOWED = ".jsonl, .txt (each also .gz, or .zst with the package zstandard), .parquet"
ROWS_PER_READ = 1024
BLANK = object()  # what a line without anything on it says


def find_files(path: str, *, key: str = "data.path") -> tuple[list[Path], int]:
    """Return the files that a file name, a folder or a glob pattern means, sorted, and how many others lie there.

    Hidden files of a folder and those of other types are left out; one of another type that is named, or meant by a pattern, is
    refused.

    Args:
        path: a file; a folder, searched to its bottom for readable names; or a pattern with *, ? or [].
        key: configuration key to name in messages.
    Raises:
        ValueError: nothing is there, or a file has a name that is not readable.
    """
    num_left_out = 0
    if os.path.isdir(path):
        below = sorted(Path(path).rglob("*"))
        # Hidden ones are an editor's or a system's own, "._book.txt" say.
        shown = [entry for entry in below if not any(part.startswith(".") for part in entry.relative_to(path).parts)]
        for entry in shown:
            _check_link(entry, key)
        found = [file for file in shown if file.is_file() and text_format(file) is not None]
        num_left_out = sum(file.is_file() for file in below) - len(found)
    elif os.path.isfile(path):
        found = [Path(path)]
    else:
        found = sorted(Path(match) for match in glob.glob(path, recursive=True) if os.path.isfile(match))
    if not found:
        what = "is a folder without readable files" if os.path.isdir(path) else "does not exist"
        raise ValueError(f"{key}={path}: {what}. Allowed: a file, folder or pattern of {ALLOWED}. Check the path.")
    for file in found:
        _check_name(file, key)
    return found, num_left_out


def text_format(path: Path) -> str | None:
    """Return the format that a file's name tells, one of READABLE; None for any other name."""
    suffixes = path.suffixes[-2:]
    if suffixes and suffixes[-1] in DECOMPRESSORS:
        suffixes = suffixes[:-1]
        return suffixes[-1] if suffixes and suffixes[-1] in READABLE and suffixes[-1] != ".parquet" else None
    return suffixes[-1] if suffixes and suffixes[-1] in READABLE else None


def _check_link(entry: Path, key: str) -> None:
    """Refuse a link in a folder that would leave text out unnoticed: to a folder, which is not searched, or to nothing."""
    if not entry.is_symlink() or entry.is_file() or (not entry.exists() and text_format(entry) is None):
        return
    what = "a link to a folder" if entry.is_dir() else "a link to a file that is not there"
    raise ValueError(
        f"{key}={entry}: is {what}. Allowed: files, folders and links to files. Copy it there or take it out."
    )


def _check_name(path: Path, key: str) -> None:
    if text_format(path) is None:
        what = "has a compression that is not read" if path.suffix in OTHER_COMPRESSIONS else "has an unknown ending"
        raise ValueError(f"{key}={path}: {what} ({path.suffix}). Allowed: {ALLOWED}. Convert the file.")


def content_hash(files: list[Path]) -> str:
    """Return one SHA-256 over the files' names and bytes as they lie on disk.

    Raises:
        ValueError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
        except OSError as error:
            raise ValueError(
                f"{path}: cannot be read ({error.strerror}). Allowed: a readable file. Check its permissions."
            ) from None
    return digest.hexdigest()


def read_files(
    files: list[Path], form: RecordForm, source: str, num_left_out: int, skipped: Counter[str]
) -> Iterator[Document]:
    """Yield the documents of the files in order; ids are file names with line or row numbers, counted from 1.

    Args:
        files: what find_files found.
        form: how a record, or a row of a table, becomes a text.
        source: name of the source, kept in every document whose record names none of its own.
        num_left_out: files of other types beside them, to be counted as skipped.
        skipped: counter of what is skipped, by reason.
    Raises:
        ValueError: a file is damaged, is not UTF-8, or a line has no text; the message names file and place.
    """
    skipped.update({"file of another type": num_left_out} if num_left_out else {})
    root = common_folder(files)
    for path in files:
        name = path.relative_to(root).as_posix()
        match text_format(path):
            case ".txt":
                yield Document(read_text_file(path, form), name, source)
            case ".parquet":
                for row, record in read_table(path, form):
                    text = form.read(record, f"{path} row {row}")
                    yield Document(text, f"{name}:{row}", form.source_of(record) or source)
            case _:
                for number, (start, line) in enumerate(split_lines(read_chunks(path)), start=1):
                    record = parse_line(line, path, start, number)
                    if record is BLANK:
                        skipped["blank line"] += 1
                        continue
                    text = form.read(record, f"{path} line {number}")
                    yield Document(text, f"{name}:{number}", form.source_of(record) or source)


def common_folder(files: list[Path]) -> Path:
    """Return the folder that ids of documents are told from."""
    return Path(os.path.commonpath([file.parent for file in files]))


def read_text_file(path: Path, form: RecordForm) -> str:
    """Return the text of a .txt file.

    Raises:
        ValueError: records of this form cannot stand in one.
    """
    if not form.is_plain:
        raise ValueError(
            f"{path}: is plain text, which has no field {form.field}. Allowed: .jsonl and .parquet. "
            "Choose data=jsonl or convert the file."
        )
    return decode(b"".join(read_chunks(path)), path, 0)


def split_lines(chunks: Iterable[bytes], start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield each line with the byte at which it begins."""
    begun: list[bytes] = []  # joined once, where the line ends: one of a gigabyte is read in thousands of chunks
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        begun.append(first)
        if not others:
            continue
        for line in (b"".join(begun), *others[:-1]):
            yield start, line
            start += len(line) + 1
        begun = [others[-1]]
    if rest := b"".join(begun):
        yield start, rest


def parse_line(line: bytes, path: Path, start: int, number: int) -> Any:
    """Return what a line of JSON says; BLANK if nothing.

    Args:
        line: bytes without the line's end.
        path: for messages.
        start: byte of the (decompressed) file at which it begins.
        number: of the line, from 1.
    Raises:
        ValueError: it is not UTF-8 or not JSON.
    """
    text_line = decode(line, path, start)
    if not text_line.strip():
        return BLANK
    try:
        return json.loads(text_line)
    except json.JSONDecodeError as error:
        reason = f"is not JSON ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in thousands of brackets
        reason = f"cannot be read as JSON ({error})"
    raise ValueError(f"{path} line {number}: {reason}. Allowed: one JSON object per line. Correct the line.")


def read_table(path: Path, form: RecordForm) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row of a parquet file, counted from 1, with the columns that the form reads.

    Raises:
        ValueError: the file is damaged or lacks the column.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if form.field not in names:
            raise ValueError(
                f"{path}: has no {form.expected} field {form.field}. Allowed: its columns, {', '.join(sorted(names))}. "
                f"{form.advice}"
            )
        columns = [form.field, *(name for name in form.other_fields if name in names)]
        row = 0
        for batch in file.iter_batches(batch_size=ROWS_PER_READ, columns=columns):
            for record in batch.to_pylist():
                row += 1
                yield row, record
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: is damaged or no parquet file ({error}). Allowed: a whole parquet file. Copy it again."
        ) from None


def decode(line: bytes, path: Path, start: int) -> str:
    """Decode one line; `start` is the byte of the (decompressed) file at which it begins."""
    mark = len(codecs.BOM_UTF8) if start == 0 and line.startswith(codecs.BOM_UTF8) else 0
    try:
        return line[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        byte = mark + error.start
        raise ValueError(
            f"{path}: is not UTF-8 at byte {start + byte} (0x{line[byte]:02x}). Allowed: UTF-8. "
            "Convert the file, for example with iconv -t UTF-8."
        ) from None
