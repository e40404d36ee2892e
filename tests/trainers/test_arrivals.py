"""What travels to the host: it is in its place before it is asked for, by whom ever, and little of it is on the way at once."""

import pytest
import torch
from small_cvfp import small_procedure
from torch import Tensor

from newllm.arrivals import OnTheWay
from newllm.trainers.context_cache import ContextCache


class Travel:
    """An event that comes when it is waited for; until then the host's memory holds what it held before."""

    def __init__(self, tensor: Tensor) -> None:
        self.host, self._sent, self.is_over = torch.full_like(tensor, torch.nan), tensor.clone(), False

    def synchronize(self) -> None:
        self.host.copy_(self._sent)
        self.is_over = True


@pytest.fixture
def travels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has everything travel, as from a GPU; the sizes of what was sent while nothing else was on the way."""
    sizes: list[int] = []
    travels: list[Travel] = []

    def to_host(tensor: Tensor) -> OnTheWay:
        assert all(travel.is_over for travel in travels)
        sizes.append(tensor.numel())
        travels.append(Travel(tensor))
        return OnTheWay(travels[-1].host, travels[-1])  # type: ignore[arg-type]

    monkeypatch.setattr("newllm.arrivals.to_host", to_host)
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
