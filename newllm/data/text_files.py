"""Documents of local files: .jsonl, .parquet (one per row) and .txt (one per file), .jsonl and .txt also as .gz or .zst."""

import codecs
import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from newllm.data.decompression import DECOMPRESSORS, OTHER_COMPRESSIONS, read_chunks
from newllm.data.document import Document

READABLE = (".jsonl", ".txt", ".parquet")
ALLOWED = ".jsonl, .txt (each also .gz, or .zst with the package zstandard), .parquet"
ROWS_PER_READ = 1024


def find_files(path: str, *, key: str = "data.path") -> tuple[list[Path], int]:
    """Return the files that a file name, a folder or a glob pattern means, sorted, and how many others lie there.

    Files of other types in a folder are left out; one that is named, or meant by a pattern, is refused.

    Args:
        path: a file; a folder, searched to its bottom for readable names; or a pattern with *, ? or [].
        key: configuration key to name in messages.
    Raises:
        ValueError: nothing is there, or a file has a name that is not readable.
    """
    num_left_out = 0
    if os.path.isdir(path):
        inside = sorted(file for file in Path(path).rglob("*") if file.is_file())
        found = [file for file in inside if text_format(file) is not None]
        num_left_out = len(inside) - len(found)
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
    files: list[Path], text_field: str, source: str, num_left_out: int, skipped: Counter[str]
) -> Iterator[Document]:
    """Yield the documents of the files in order; ids are file names with line or row numbers, counted from 1.

    Args:
        files: what find_files found.
        text_field: field of a JSON object, or column of a table, that holds the text.
        source: name of the source, kept in every document.
        num_left_out: files of other types beside them, to be counted as skipped.
        skipped: counter of what is skipped, by reason.
    Raises:
        ValueError: a file is damaged, is not UTF-8, or a line has no text; the message names file and place.
    """
    skipped.update({"file of another type": num_left_out} if num_left_out else {})
    root = os.path.commonpath([file.parent for file in files])
    for path in files:
        name = path.relative_to(root).as_posix()
        match text_format(path):
            case ".txt":
                yield Document(_decode(b"".join(read_chunks(path)), path, 0), name, source)
            case ".parquet":
                for row, text in enumerate(_parquet_texts(path, text_field), start=1):
                    yield Document(text, f"{name}:{row}", source)
            case _:
                for number, text in _jsonl_texts(path, text_field, skipped):
                    yield Document(text, f"{name}:{number}", source)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield each line with the byte at which it begins."""
    start, rest = 0, b""
    for chunk in read_chunks(path):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield start, line
            start += len(line) + 1
    if rest:
        yield start, rest


def _jsonl_texts(path: Path, text_field: str, skipped: Counter[str]) -> Iterator[tuple[int, str]]:
    for number, (start, line) in enumerate(_lines(path), start=1):
        text_line = _decode(line, path, start)
        if not text_line.strip():
            skipped["blank line"] += 1
            continue
        try:
            record = json.loads(text_line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} line {number}: is not JSON ({error.msg} at column {error.colno}). "
                "Allowed: one JSON object per line. Correct the line."
            ) from None
        text = record.get(text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ValueError(_no_text(f"{path} line {number}", text_field, record))
        yield number, text


def _no_text(where: str, text_field: str, record: object) -> str:
    if not isinstance(record, dict):
        return f"{where}: is not a JSON object. Allowed: an object with the field {text_field}. Correct the line."
    fields = ", ".join(sorted(key for key, value in record.items() if isinstance(value, str))) or "none"
    what = f"has no text field {text_field}" if text_field not in record else f"has no text in its field {text_field}"
    return f"{where}: {what}. Allowed: fields with text, here {fields}. Set data.text_field or correct the line."


def _parquet_texts(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if text_field not in file.schema_arrow.names:
            columns = ", ".join(sorted(file.schema_arrow.names))
            raise ValueError(
                f"{path}: has no text field {text_field}. Allowed: its columns, {columns}. Set data.text_field."
            )
        row = 0
        for batch in file.iter_batches(batch_size=ROWS_PER_READ, columns=[text_field]):
            for text in batch.column(0).to_pylist():
                row += 1
                if not isinstance(text, str):
                    raise ValueError(_no_text(f"{path} row {row}", text_field, {text_field: text}))
                yield text
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: is damaged or no parquet file ({error}). Allowed: a whole parquet file. Copy it again."
        ) from None


def _decode(line: bytes, path: Path, start: int) -> str:
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
