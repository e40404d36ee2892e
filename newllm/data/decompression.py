"""Bytes of a file, decompressed; a damaged file is named together with the byte up to which it could be read."""

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 16


def _gzip_decompressor() -> Any:
    return zlib.decompressobj(wbits=31)  # 31: gzip header and checksum, largest window


def _zstd_decompressor() -> Any:
    try:
        import zstandard
    except ImportError:
        raise ValueError("a .zst file: needs a package. Allowed: zstandard. Run pip install zstandard.") from None
    return zstandard.ZstdDecompressor().decompressobj()


DECOMPRESSORS: dict[str, Callable[[], Any]] = {".gz": _gzip_decompressor, ".zst": _zstd_decompressor}
OTHER_COMPRESSIONS = frozenset({".br", ".bz2", ".lz4", ".lzma", ".rar", ".snappy", ".tar", ".tgz", ".xz", ".zip"})


def read_chunks(path: Path) -> Iterator[bytes]:
    """Yield the file's bytes in pieces, decompressed if its name ends in .gz or .zst.

    A file that ends inside its last frame is damaged, never quietly shorter.

    Raises:
        ValueError: the file is damaged; the message says how many bytes of text could be read.
    """
    with path.open("rb") as file:
        pieces = iter(lambda: file.read(CHUNK_BYTES), b"")
        if path.suffix not in DECOMPRESSORS:
            yield from pieces
            return
        num_bytes = 0
        try:
            for piece in _decompress(pieces, DECOMPRESSORS[path.suffix]):
                num_bytes += len(piece)
                yield piece
        except (zlib.error, EOFError, _zstd_error()) as error:
            raise ValueError(
                f"{path}: is damaged after byte {num_bytes} of its text ({error}). "
                f"Allowed: a whole {path.suffix} file. Copy or compress it again."
            ) from None


def _decompress(pieces: Iterator[bytes], create: Callable[[], Any]) -> Iterator[bytes]:
    """Decompress frame after frame: both formats allow several in one file."""
    decompressor = create()
    for piece in pieces:
        while piece:
            if decompressor.eof:
                piece = piece.lstrip(b"\0")  # gzip files may be padded with zeros
                decompressor = create() if piece else decompressor
            if piece:
                yield decompressor.decompress(piece)
                piece = decompressor.unused_data
    if not decompressor.eof:
        raise EOFError("the file ends before its text does")


def _zstd_error() -> type[Exception]:
    try:
        import zstandard
    except ImportError:
        return EOFError
    return zstandard.ZstdError
