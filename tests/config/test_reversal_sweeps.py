"""The sweeps over facts in two directions: what their jobs train."""

import pytest

from newllm.config.compose import compose
from newllm.config.library import hydra_setting, options
from newllm.config.sweeps import examine_jobs

MODELS = sorted(name for name in options("experiment") if name is not None and name.startswith("reversal"))


@pytest.mark.parametrize("sweep", ["reversal", "reversal_reverse", "reversal_both_ways"])
def test_every_model_is_asked_under_every_control(sweep: str) -> None:
    params = hydra_setting("train", [f"sweep={sweep}"], "sweeper.params")

    assert sorted(params["experiment"].split(",")) == MODELS
    assert params["seed"] == "0,1,2"
    assert compose([f"sweep={sweep}"]).name == sweep


@pytest.mark.parametrize("sweep", ["reversal_reverse", "reversal_both_ways"])
def test_controls_are_possible(sweep: str) -> None:
    assert examine_jobs([f"sweep={sweep}", "experiment=reversal_trm", "seed=0"], "train") == []
