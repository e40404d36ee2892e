"""Folders of tokenised text on disk: named by what they hold, written whole or not at all, checked when opened."""

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from newllm.whole_file import sync

FORMAT_VERSION = 4  # raised whenever code writes other bytes for the same key
META = "meta.json"
NAME_DIGITS = 16


class DamagedCacheError(Exception):
    """A cache folder does not hold what its meta.json says."""


@dataclass(frozen=True)
class CachedFolder:
    """An intact cache folder.

    Attributes:
        path: the folder.
        meta: what its builder recorded.
        rebuilt_because: why an older folder of that name was replaced; None if there was none.
    """

    path: Path
    meta: dict[str, Any]
    files: dict[str, dict[str, Any]]
    rebuilt_because: str | None = None

    def ids(self, name: str) -> np.ndarray:
        """Return a file of ids, memory-mapped and read-only."""
        dtype = np.dtype(self.meta["dtype"])
        if self.files[name]["bytes"] == 0:  # an empty file cannot be mapped
            return np.empty(0, dtype)
        return np.memmap(self.path / name, dtype=dtype, mode="r")


def open_or_build(cache_dir: str | Path, key: dict[str, Any], build: Callable[[Path], dict[str, Any]]) -> CachedFolder:
    """Return the cache of a key, built first if there is none or if it is damaged.

    A killed builder leaves nothing under the final name. Of two processes at once one builds, the other waits.

    Args:
        cache_dir: folder of all caches.
        key: plain values that decide every byte of the cache.
        build: writes the files into the folder it is given and returns what is to be recorded as meta.
    Raises:
        ValueError: the folder under that name holds another configuration, or the disk does not take the files.
    """
    key = {**key, "format": FORMAT_VERSION}
    folder = Path(cache_dir) / hashlib.sha256(_dump(key)).hexdigest()[:NAME_DIGITS]
    try:
        cached, reason = _open(folder, key), None
    except DamagedCacheError as error:
        cached, reason = None, str(error)
    if cached is not None:
        return cached
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            return _open_or_build_locked(folder, key, build, reason)
    except OSError as error:
        raise ValueError(
            f"data.cache_dir={cache_dir}: does not take {folder.name} ({error.strerror or error}). "
            "Allowed: a writable folder with free space. Free space or set data.cache_dir."
        ) from error


def _open_or_build_locked(
    folder: Path, key: dict[str, Any], build: Callable[[Path], dict[str, Any]], reason: str | None
) -> CachedFolder:
    try:
        cached = _open(folder, key)  # another process may have built it while this one waited
    except DamagedCacheError as error:
        cached, reason = None, str(error)
        warnings.warn(f"{folder}: {error}; it is built again.", stacklevel=4)
    if cached is not None:
        return cached
    for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):  # of builders that were killed: we hold their lock
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        meta = build(temporary)
        _write_meta(temporary, key, meta)
        if folder.exists():
            folder.rename(temporary.with_name(f"{temporary.name}-damaged"))
        temporary.rename(folder)
        sync(folder.parent)
    finally:
        for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
    opened = _open(folder, key)
    assert opened is not None, f"{folder} was renamed into place and is not there"
    return CachedFolder(opened.path, opened.meta, opened.files, reason)


def _open(folder: Path, key: dict[str, Any]) -> CachedFolder | None:
    """Return the folder if it is intact, None if there is none."""
    if not folder.exists():
        return None
    try:
        content = json.loads((folder / META).read_bytes())
        checksum = content.pop("checksum")
        if hashlib.sha256(_dump(content)).hexdigest() != checksum:
            raise DamagedCacheError(f"{META} does not match its checksum")
        if content["key"] != key:
            raise ValueError(
                f"{folder}: holds the tokens of another configuration. Allowed: the folder's own name. Delete it."
            )
        for name, file in content["files"].items():
            _check_file(folder / name, file)
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCacheError(f"{META} or a file is missing or not whole ({type(error).__name__}: {error})") from None
    return CachedFolder(folder, content["meta"], content["files"])


def _check_file(path: Path, expected: dict[str, Any]) -> None:
    num_bytes = path.stat().st_size
    if num_bytes != expected["bytes"]:
        raise DamagedCacheError(f"{path.name} has {num_bytes} of {expected['bytes']} bytes")
    if _file_hash(path) != expected["sha256"]:
        raise DamagedCacheError(f"{path.name} does not match its checksum")


def _write_meta(folder: Path, key: dict[str, Any], meta: dict[str, Any]) -> None:
    """Write meta.json last, after all it describes has reached the disk."""
    files = {}
    for path in sorted(folder.iterdir()):
        sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _file_hash(path)}
    content = {"key": key, "meta": meta, "files": files}
    checksum = hashlib.sha256(_dump(content)).hexdigest()
    (folder / META).write_bytes(_dump({**content, "checksum": checksum}))
    sync(folder / META)
    sync(folder)


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _dump(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()
