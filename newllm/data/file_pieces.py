"""Local files as a stream: cut into pieces that several readers can share, read line by line.

A plain .jsonl file is cut every PIECE_BYTES, so that even one large file has a piece for every reader, and a reader that
continues has less than a piece to read again. Compressed files and tables are pieces as a whole.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from newllm.data.decompression import read_chunks
from newllm.data.document import Document
from newllm.data.document_stream import DocumentStream, long_enough
from newllm.data.records import RecordForm
from newllm.data.text_files import (
    BLANK,
    common_folder,
    find_files,
    parse_line,
    read_table,
    read_text_file,
    split_lines,
    text_format,
)

PIECE_BYTES = 1 << 24
SAMPLE_BYTES = 1 << 16
Piece = tuple[str, int, int]
"""A file, the byte at which a piece of it begins, and the byte at which the next one begins."""


def cut_pieces(files: list[Path], piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """Return the pieces of the files, in order."""
    pieces = []
    for path in files:
        size = path.stat().st_size
        step = piece_bytes if path.suffix == ".jsonl" else max(size, 1)
        pieces += [(str(path), start, min(start + step, size)) for start in range(0, max(size, 1), step)]
    return pieces


def read_pieces(pieces: list[Piece], *, root: Path, form: RecordForm) -> Iterator[dict[str, Any]]:
    """Yield what the pieces hold: a text with its id and source, or the reason why something is skipped.

    Ids are file names with the byte at which a line begins, or with the number of a row.

    Raises:
        ValueError: a file is damaged, is not UTF-8, or a line has no text; the message names file and place.
    """
    for path_name, start, end in pieces:
        path = Path(path_name)
        name = path.relative_to(root).as_posix()
        match text_format(path):
            case ".txt":
                yield _record(read_text_file(path, form), name, None)
            case ".parquet":
                for row, record in read_table(path, form):
                    yield _record(form.read(record, f"{path} row {row}"), f"{name}:{row}", form.source_of(record))
            case _ if path.suffix == ".jsonl":
                for byte, line in _lines_between(path, start, end):
                    yield _read_line(path, byte, line, None, form, name)
            case _:
                for number, (byte, line) in enumerate(split_lines(read_chunks(path)), start=1):
                    yield _read_line(path, byte, line, number, form, name)


def _record(text: str, document_id: str, source: str | None) -> dict[str, Any]:
    return {"text": text, "id": document_id, "source": source, "skipped": None}


def _lines_between(path: Path, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that begin in a piece of a file, with their first bytes."""
    with path.open("rb") as file:
        if start > 0:
            file.seek(start - 1)
            start += len(file.readline()) - 1  # the line that an earlier piece has begun
        while start < end and (line := file.readline()):
            yield start, line.rstrip(b"\n")
            start += len(line)


def _read_line(path: Path, start: int, line: bytes, number: int | None, form: RecordForm, name: str) -> dict[str, Any]:
    try:
        record = parse_line(line, path, start, number or 0)
        if record is BLANK:
            return {"text": None, "id": None, "source": None, "skipped": "blank line"}
        text = form.read(record, f"{path} line {number}")
    except ValueError:
        if number is not None:
            raise
        # Counted only now: a reader in the middle of a large file need not know the number of its line.
        return _read_line(path, start, line, 1 + _count_lines(path, start), form, name)
    return _record(text, f"{name}@{start}", form.source_of(record))


def _count_lines(path: Path, end: int) -> int:
    """Return how many lines end before a byte of a file."""
    count, left = 0, end
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(left, 1 << 20))):
            count += chunk.count(b"\n")
            left -= len(chunk)
    return count


def document_of(source: str, min_characters: int, record: dict[str, Any], skipped: Counter[str]) -> Document | None:
    """Return the document of what read_pieces has read; None, and counted, where it is skipped."""
    if record["skipped"] is not None:
        skipped[record["skipped"]] += 1
        return None
    return long_enough(Document(record["text"], record["id"], record["source"] or source), min_characters, skipped)


def file_stream(path: str, form: RecordForm, *, kind: str, min_characters: int = 0) -> DocumentStream:
    """Return local files as a stream.

    Args:
        path: file, folder or pattern.
        form: of the records.
        kind: of the data, for records that name no source of their own.
        min_characters: shorter texts are skipped and counted.
    Raises:
        ValueError: nothing is there, or a file has a name that is not readable.
    """
    from datasets import IterableDataset

    files, num_left_out = find_files(path)
    signature = {
        "kind": kind,
        "form": form.signature,
        "min_characters": min_characters,
        "left_out": num_left_out,
        "files": [_fingerprint(file) for file in files],
    }
    reader = partial(read_pieces, root=common_folder(files), form=form)
    records = IterableDataset.from_generator(reader, gen_kwargs={"pieces": cut_pieces(files)})
    return DocumentStream(f"data.path={path}", signature, records, partial(document_of, kind, min_characters))


def _fingerprint(path: Path) -> dict[str, Any]:
    """Return what tells a file from another without reading all of it: name, size, and a hash of both ends."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(SAMPLE_BYTES)
            file.seek(max(0, size - SAMPLE_BYTES))
            ends = hashlib.sha256(first + file.read()).hexdigest()
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}). Allowed: a readable file. Check its permissions."
        ) from None
    return {"name": path.name, "bytes": size, "ends": ends}
