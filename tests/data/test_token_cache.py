import multiprocessing
import os
import signal
import time
import warnings
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from newllm.data.token_cache import META, open_or_build

KEY = {"source": "made"}
IDS = np.arange(1000, dtype=np.uint16)


class Builder:
    """Writes IDS and counts how often it was asked to."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path) -> dict[str, Any]:
        self.calls += 1
        IDS.tofile(folder / "train.bin")
        (folder / "test.bin").write_bytes(b"")
        return {"dtype": "uint16", "calls": self.calls}


def only_folder(cache_dir: Path) -> Path:
    (folder,) = (path for path in cache_dir.iterdir() if path.is_dir())
    return folder


def test_a_second_opening_reads_what_the_first_wrote(tmp_path: Path) -> None:
    build = Builder()

    first, second = (open_or_build(tmp_path, KEY, build) for _ in range(2))

    assert build.calls == 1
    assert first == second
    assert isinstance(second.ids("train.bin"), np.memmap)
    assert second.ids("train.bin").tolist() == IDS.tolist()
    assert second.ids("test.bin").tolist() == []


def test_another_key_is_another_cache(tmp_path: Path) -> None:
    build = Builder()

    one, other = (open_or_build(tmp_path, {"source": name}, build) for name in ("one", "other"))

    assert build.calls == 2
    assert one.path != other.path


def truncate(folder: Path) -> None:
    os.truncate(folder / "train.bin", 1999)


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / "train.bin").read_bytes())
    content[1234] ^= 1
    (folder / "train.bin").write_bytes(content)


def change_the_record(folder: Path) -> None:
    (folder / META).write_bytes((folder / META).read_bytes().replace(b'"calls": 1', b'"calls": 7'))


def lose_the_file(folder: Path) -> None:
    (folder / "train.bin").unlink()


def lose_the_record(folder: Path) -> None:
    (folder / META).unlink()


def halve_the_record(folder: Path) -> None:
    (folder / META).write_bytes((folder / META).read_bytes()[:50])


def empty_the_record(folder: Path) -> None:
    (folder / META).write_bytes(b"[]")


@pytest.mark.parametrize(
    "damage",
    [truncate, flip_a_byte, change_the_record, lose_the_file, lose_the_record, halve_the_record, empty_the_record],
)
def test_a_damaged_cache_is_rebuilt_with_a_warning(tmp_path: Path, damage: Any) -> None:
    build = Builder()
    open_or_build(tmp_path, KEY, build)
    damage(only_folder(tmp_path))

    with pytest.warns(UserWarning, match=r"; it is built again"):
        cached = open_or_build(tmp_path, KEY, build)

    assert build.calls == 2
    assert cached.ids("train.bin").tolist() == IDS.tolist()
    assert cached.rebuilt_because is not None
    assert only_folder(tmp_path) == cached.path
    assert open_or_build(tmp_path, KEY, build).rebuilt_because is None


def test_a_cache_of_another_configuration_is_refused(tmp_path: Path) -> None:
    other = open_or_build(tmp_path, {"source": "other"}, Builder())
    own = open_or_build(tmp_path, KEY, Builder())
    for file in own.path.iterdir():
        file.unlink()
    for file in other.path.iterdir():
        file.rename(own.path / file.name)

    with pytest.raises(ValueError, match=r"holds the tokens of another configuration. .* Delete it"):
        open_or_build(tmp_path, KEY, Builder())


def test_a_builder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        IDS.tofile(folder / "train.bin")
        raise ValueError("a bad line")

    with pytest.raises(ValueError, match="a bad line"):
        open_or_build(tmp_path, KEY, fail)

    assert [path.suffix for path in tmp_path.iterdir()] in ([".lock"], [])


def test_a_full_disk_is_told_with_the_folder(tmp_path: Path) -> None:
    def fill(folder: Path) -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match=r"data.cache_dir=.*: does not take .* \(No space left on device\)"):
        open_or_build(tmp_path, KEY, fill)


def write_slowly(cache_dir: Path, has_begun: Event) -> None:
    def build(folder: Path) -> dict[str, Any]:
        IDS.tofile(folder / "train.bin")
        has_begun.set()
        time.sleep(60)
        raise AssertionError("not killed")

    open_or_build(cache_dir, KEY, build)


def test_a_killed_writer_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    has_begun = context.Event()
    writer = context.Process(target=write_slowly, args=(tmp_path, has_begun))
    writer.start()
    assert has_begun.wait(20)
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached = open_or_build(tmp_path, KEY, Builder())

    assert cached.ids("train.bin").tolist() == IDS.tolist()
    assert only_folder(tmp_path) == cached.path


def build_and_count(cache_dir: Path, counts: Any) -> None:
    def build(folder: Path) -> dict[str, Any]:
        counts.put("built")
        time.sleep(0.5)
        return Builder()(folder)

    cached = open_or_build(cache_dir, KEY, build)
    counts.put(cached.ids("train.bin").tolist() == IDS.tolist())


def test_of_several_processes_at_once_one_builds_and_all_read(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    counts = context.Queue()
    processes = [context.Process(target=build_and_count, args=(tmp_path, counts)) for _ in range(3)]

    for process in processes:
        process.start()
    answers = [counts.get(timeout=30) for _ in range(4)]
    for process in processes:
        process.join()

    assert answers.count("built") == 1
    assert answers.count(True) == 3


def test_an_intact_cache_opens_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_or_build(tmp_path, KEY, Builder())
    monkeypatch.setattr("newllm.data.token_cache.FileLock", lambda path: pytest.fail("a lock was written"))

    assert open_or_build(tmp_path, KEY, Builder()).meta["calls"] == 1
