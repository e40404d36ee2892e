"""What travels to the host: it is in its place before it is asked for, by whom ever, and little of it is on the way at once."""

from typing import Any

import pytest
import torch
from small_cvfp import small_procedure
from torch import Tensor

from newllm.trainers.arrivals import Arrivals
from newllm.trainers.context_cache import ContextCache


class Arrived:
    """An event that has come."""

    def synchronize(self) -> None:
        pass


@pytest.fixture
def travels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has everything travel, as from a GPU; the sizes of what was sent while nothing else was on the way."""
    sizes: list[int] = []

    def expect(self: Arrivals, tensor: Tensor, put: Any) -> None:
        assert self._expected is None
        self._expected = tensor.clone(), put, Arrived()  # type: ignore[assignment]
        sizes.append(tensor.numel())

    monkeypatch.setattr(Arrivals, "_expect", expect)
    monkeypatch.setattr(Arrivals, "_is_there", staticmethod(lambda tensor: False))
    return sizes


def test_a_view_of_a_cache_finds_what_the_cache_was_sent_and_the_other_way_round(travels: list[int]) -> None:
    cache = ContextCache.empty(3, 4)
    last = cache.last(2)
    last.write(torch.tensor([[1]]), torch.ones(1, 1, 2))

    assert cache.read(torch.tensor([[1]]), like=torch.zeros(1)).tolist() == [[[0, 0, 1, 1]]]

    cache.write(torch.tensor([[2]]), torch.full((1, 1, 4), 5.0))

    assert last.contexts.tolist() == [[0, 0], [1, 1], [5, 5]]
    assert travels == [2, 4]


@pytest.mark.parametrize("contexts", ["exact", "parallel"])
def test_phase_2_is_filled_with_the_same_contexts_when_they_travel(
    contexts: str, request: pytest.FixtureRequest
) -> None:
    def filled() -> Tensor:
        options = (
            "trainer.phase1=untrained",
            f"trainer.contexts={contexts}",
            "model.num_layers=2",
            "trainer.slice_tokens=20",
        )
        procedure = small_procedure("cvfp_phase2", *options)
        procedure.on_fit_start()
        return procedure.cache.contexts.clone()

    at_once = filled()
    travels: list[int] = request.getfixturevalue("travels")
    travelling = filled()

    assert at_once.abs().sum(dim=0).min() > 0
    assert torch.equal(travelling, at_once)
    assert len(travels) > 5
