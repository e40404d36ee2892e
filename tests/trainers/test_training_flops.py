"""FLOPs per token of a training step, as speed/mfu and the cost table use them, against the products a step really makes."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from newllm.config.compose import compose
from newllm.config.typed import real_config
from newllm.models.create import build_model
from newllm.trainers.build import build_training_module

VOCABULARY, ROWS, LENGTH = 64, 2, 32
LCT = ["model=pythia", "trainer=lct", "trainer.cache=none"]


def counted_and_stated(overrides: list[str], folder: Path) -> tuple[float, float]:
    config = real_config(compose([*overrides, f"data.block_length={LENGTH}", f"data.batch_size={ROWS}"]))
    model = build_model(config, VOCABULARY).train()
    module = build_training_module(model, config, torch.ones(VOCABULARY), num_samples=8, folder=folder)
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH))
    batch = {"input_ids": ids, "labels": ids, "sample_id": torch.arange(ROWS)}
    # The fused kernels count the way back otherwise: they make scores twice.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module.loss(model, module.states(batch), ids).backward()
    stated = module.training_flops_per_token(model, config)
    assert stated is not None
    return counter.get_total_flops() / (ROWS * LENGTH), stated


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=pythia"],
        [*LCT, "trainer.sweeps=1", "trainer.init_sweeps=1"],
        [*LCT, "trainer.sweeps=3", "trainer.init_sweeps=2"],
        ["model=trm", "trainer=trm", "loss=deep_supervision"],
        ["model=selective", "trainer=selective", "loss=fixed_skip"],
        ["model=selective", "model.halting=learned", "trainer=selective", "loss=halting"],
    ],
    ids=lambda overrides: "-".join(overrides),
)
def test_a_step_makes_the_products_that_are_stated(overrides: list[str], tmp_path: Path) -> None:
    counted, stated = counted_and_stated(overrides, tmp_path)

    # Inputs that take no gradient (given states, zeros) save a few products.
    assert stated == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("given", [["trainer.sweeps=auto"], ["trainer.solver=newton", "layers.window=1"]])
def test_what_depends_on_the_training_or_the_map_states_nothing(given: list[str], tmp_path: Path) -> None:
    config = real_config(compose([*LCT, *given]))
    model = build_model(config, VOCABULARY)
    module = build_training_module(model, config, torch.ones(VOCABULARY), num_samples=8, folder=tmp_path)

    assert module.training_flops_per_token(model, config) is None
