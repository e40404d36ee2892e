"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write; `path` becomes it when the block ends, and stays what it was when the block fails.

    The bytes are on disk before the name points to them: a crash or a cut of power leaves the old file or the new one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Make `path` hold exactly `text` (UTF-8), whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode())


def link_whole(source: Path, path: Path) -> None:
    """Make `path` hold what `source` holds now, without a second copy where the file system has hard links.

    Safe only among files that are replaced and never changed in place: both names share their bytes.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # no hard links here (FAT, some network file systems)
        with open(source, "rb") as original, whole_file(path) as copy:
            while piece := original.read(1 << 24):
                copy.write(piece)
        return
    os.replace(temporary, path)
    # Renaming onto another name of the same file does nothing and leaves the temporary name behind (POSIX).
    temporary.unlink(missing_ok=True)
    sync(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a killed process left in `folder`."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
