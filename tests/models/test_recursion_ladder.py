"""The rungs of the recursion ladder cost the same and each adds one thing."""

import pytest
import torch

from newllm.config.compose import compose
from newllm.config.library import options
from newllm.models.create import build_model

RUNGS = sorted(name for name in options("experiment") if name.startswith("ladder_"))


def flops(name: str) -> float:
    config = compose([f"experiment={name}"])
    with torch.device("meta"):
        model = build_model(config, 4096)
    return model.flops_per_token(config.data.block_length)


def test_every_rung_makes_the_flops_of_the_last() -> None:
    costs = {name: flops(name) for name in RUNGS}

    assert len(costs) == 7
    assert costs == pytest.approx(dict.fromkeys(RUNGS, costs[RUNGS[-1]]), rel=1e-9)


@pytest.mark.parametrize("steps", [2, 3])
def test_controls_of_carried_steps_make_their_flops(steps: int) -> None:
    costs = {
        name: flops(name) for name in options("experiment") if name is not None and name.startswith(f"skip_{steps}")
    }

    assert len(costs) == 4
    assert costs == pytest.approx(dict.fromkeys(costs, costs[f"skip_{steps}"]), rel=0.01)


def test_steps_of_a_token_cost_the_same_whatever_they_carry() -> None:
    costs = {}
    for carry in ("projection", "identity", "pause"):
        config = compose(["model=selective", "model.skip_interval=3", f"model.carry={carry}"])
        with torch.device("meta"):
            costs[carry] = build_model(config, 4096).flops_per_token(128)

    assert costs["identity"] == costs["pause"]
    # The projection itself: two maps of 128 x 128 beside three stacks of four layers.
    assert costs["projection"] == costs["identity"] + 2 * 2 * 128**2
