import json
import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from newllm.trainers.lagged_cache import LaggedCache, cache_bytes, check_fits


def states_of(sample_ids: torch.Tensor, visit: int) -> torch.Tensor:
    """States [B, 3, 2] that say which sample and visit they are of."""
    return (sample_ids * 100.0 + visit).view(-1, 1, 1).expand(-1, 3, 2)


@settings(deadline=None, max_examples=30)
@given(orders=st.lists(st.permutations(range(7)), min_size=1, max_size=4), batch=st.integers(1, 7))
def test_states_stay_with_their_sample_under_shuffling(orders: list[list[int]], batch: int):
    cache = LaggedCache(7, 3, 2, dtype="fp32")
    last_visit: dict[int, int] = {}

    for visit, order in enumerate(orders, start=1):
        for start in range(0, 7, batch):
            ids = torch.tensor(order[start : start + batch])
            found = cache.gather(ids, device=torch.device("cpu"), dtype=torch.float32)
            for row, sample in enumerate(ids.tolist()):
                expected = 0.0 if sample not in last_visit else sample * 100.0 + last_visit[sample]
                assert (found[row] == expected).all()
            cache.scatter(ids, states_of(ids, visit))
            last_visit |= dict.fromkeys(ids.tolist(), visit)

    assert cache.visits.tolist() == [len(orders)] * 7


def test_a_gathered_batch_does_not_change_when_the_cache_does():
    cache, ids = LaggedCache(4, 3, 2, dtype="fp32"), torch.tensor([1, 2])
    cache.scatter(ids, states_of(ids, 1))
    before = cache.gather(ids, device=torch.device("cpu"), dtype=torch.float32)
    kept = before.clone()

    cache.scatter(ids, states_of(ids, 2))

    assert torch.equal(before, kept)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_disk_and_ram_keep_the_same(dtype: str, tmp_path):
    ids = torch.tensor([3, 0])
    caches = [LaggedCache(5, 3, 2, dtype=dtype), LaggedCache(5, 3, 2, dtype=dtype, path=tmp_path / "cache.bin")]
    for cache in caches:
        cache.scatter(ids, torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(1)))

    in_ram, on_disk = (
        cache.gather(torch.arange(5), device=torch.device("cpu"), dtype=torch.float32) for cache in caches
    )

    assert torch.equal(in_ram, on_disk)
    assert in_ram[3].abs().sum() > 0
    assert (tmp_path / "cache.bin").stat().st_size == caches[1].nbytes == cache_bytes(5, 3, 2, caches[1].dtype)


def test_states_that_are_not_finite_are_not_kept():
    cache, ids = LaggedCache(4, 3, 2, dtype="bf16"), torch.tensor([0, 1])
    cache.scatter(ids, states_of(ids, 1))
    broken = states_of(ids, 2).clone()
    broken[1, 0, 0] = torch.nan

    cache.scatter(ids, broken)

    found = cache.gather(ids, device=torch.device("cpu"), dtype=torch.float32)
    assert found[:, 0, 0].tolist() == [2, 101]
    assert cache.visits.tolist() == [2, 1, 0, 0]


def test_a_file_with_a_torn_description_is_refused(tmp_path):
    LaggedCache(5, 3, 2, dtype="bf16", path=tmp_path / "cache.bin")
    (tmp_path / "cache.json").write_text('{"sha')

    with pytest.raises(ValueError, match=r"cache\.bin: holds states of another configuration .*Delete it"):
        LaggedCache(5, 3, 2, dtype="bf16", path=tmp_path / "cache.bin")


def test_a_file_of_another_configuration_is_refused(tmp_path):
    LaggedCache(5, 3, 2, dtype="bf16", path=tmp_path / "cache.bin")

    with pytest.raises(ValueError, match="holds states of another configuration"):
        LaggedCache(5, 4, 2, dtype="bf16", path=tmp_path / "cache.bin")
    assert json.loads((tmp_path / "cache.json").read_text())["shape"] == [5, 3, 2]


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_cache_that_does_not_fit_is_refused_with_its_size(on_disk: bool, tmp_path):
    with pytest.raises(ValueError, match=r"needs 1048576\.00 GiB .* there are .* GiB"):
        check_fits(2**50, tmp_path / "not" / "there.bin" if on_disk else None)


def test_a_resumed_run_has_room_where_its_own_file_lies(tmp_path, monkeypatch):
    path, ids = tmp_path / "cache.bin", torch.arange(64)
    first = LaggedCache(64, 32, 32, dtype="fp32", path=path)
    first.scatter(ids, torch.ones(64, 32, 32))
    with path.open("rb") as file:
        os.fsync(file.fileno())  # file systems give pages a place when they are written, not before
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=first.nbytes // 4))

    again = LaggedCache(64, 32, 32, dtype="fp32", path=path)

    assert torch.equal(again.states, first.states)
    with pytest.raises(ValueError, match=r"trainer\.cache: needs"):
        LaggedCache(64, 32, 32, dtype="fp32", path=tmp_path / "other.bin")


@pytest.mark.parametrize("on_disk", [False, True])
def test_processes_of_one_machine_share_what_is_free(on_disk: bool, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**31))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**31))
    path = tmp_path / "cache.bin" if on_disk else None

    check_fits(2**30, path)
    with pytest.raises(ValueError, match=r"needs 2\.00 GiB .* there are 2\.00 GiB"):
        check_fits(2**30, path, sharers=2)


def test_a_checkpoint_without_states_forgets_the_visits():
    cache, ids = LaggedCache(4, 3, 2, dtype="bf16"), torch.tensor([0, 1])
    cache.scatter(ids, states_of(ids, 1))

    carried = cache.state_dict(with_states=False)

    assert not cache.load_state_dict(carried)
    assert not cache.is_visited(ids).any()
    assert cache.load_state_dict({**carried, "states": cache.states})
    assert cache.is_visited(ids).all()
