"""A training step asks the device for nothing: no number is read and no result's shape depends on values.

On a CPU the operations that would make the host wait for a GPU are found by name, for values that come from weights or batch.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_cvfp import small_procedure
from torch import Tensor
from waits import Waits

from newllm.arrivals import Arrivals
from newllm.config.compose import compose
from newllm.config.typed import real_config
from newllm.models.create import build_model
from newllm.trainers.base import TrainingModule
from newllm.trainers.build import build_training_module

VOCABULARY, ROWS, LENGTH = 64, 3, 20
HOST = (
    "sample_id",
    "starts_text",
    "is_padding",
    "position",
)  # parts of a batch that stay on the host where the procedure reads them there
PROCEDURES = {
    "standard-pythia": ["model=pythia"],
    "standard-infini": ["model=infini", "layers.segment_length=8"],
    "standard-delta_token": ["model=infini", "layers.segment_length=8", "layers.memory_kernel=delta_token"],
    "standard-multi_memory": ["model=multi_memory", "layers.segment_length=8"],
    "standard-hierarchical": ["model=hierarchical", "layers.segment_length=8"],
    "lct-infini": ["model=infini", "layers.segment_length=8", "trainer=lct", "trainer.cache=none"],
    "lct-context": ["model=context", "trainer=lct", "trainer.cache=none"],
    "lct-new_llm": ["model=new_llm", "trainer=lct", "trainer.cache=none"],
    "lct-context_pythia": ["model=context_pythia", "trainer=lct", "trainer.cache=none"],
    "sequential": ["model=infini", "layers.segment_length=8", "trainer=sequential"],
    "streaming": ["model=infini", "layers.segment_length=8", "trainer=streaming"],
    "selective-fixed": ["model=selective", "trainer=selective", "loss=fixed_skip"],
    "selective-halting": ["model=selective", "model.halting=learned", "trainer=selective", "loss=halting"],
    "trm": ["model=trm", "trainer=trm", "loss=deep_supervision"],
}


def prepared(overrides: list[str], folder: Path, device: str = "cpu") -> tuple[TrainingModule, Any, dict[str, Tensor]]:
    """A procedure, its optimizer, and a batch in which some positions have no target."""
    config = real_config(compose([*overrides, f"data.block_length={LENGTH}", f"data.batch_size={ROWS}"]))
    model = build_model(config, VOCABULARY).to(device).train()
    module = build_training_module(model, config, torch.ones(VOCABULARY), num_samples=8, folder=folder).to(device)
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), device=device)
    labels = ids.roll(-1, dims=1)
    labels[:, -1] = -100
    starts = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    starts[:, 0] = True
    batch = {
        "input_ids": ids,
        "labels": labels,
        "sample_id": torch.arange(ROWS),
        "starts_text": starts,
        "is_padding": labels == -100,
    }
    return module, module.configure_optimizers()["optimizer"], batch


def step(module: TrainingModule, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    module.backward(module.training_step(batch, 0))
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", PROCEDURES)
def test_a_training_step_reads_nothing_from_the_device(name: str, tmp_path: Path) -> None:
    module, optimizer, batch = prepared(PROCEDURES[name], tmp_path)
    step(module, optimizer, batch)
    on_device = [*module.parameters(), *[tensor for key, tensor in batch.items() if key not in HOST]]

    with Waits(on_device) as waits:
        step(module, optimizer, batch)

    assert not waits.found


@pytest.mark.parametrize("name", ["cvfp_phase1", "cvfp_phase2"])
def test_a_step_over_cached_contexts_reads_nothing_from_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = small_procedure(name, *["trainer.phase1=untrained"] * (name == "cvfp_phase2"))
    optimizer = module.configure_optimizers()["optimizer"]
    if name == "cvfp_phase2":
        module.on_fit_start()
    # What travels is put in its place on the host, without the device.
    monkeypatch.setattr(Arrivals, "send", lambda self, tensor, put: None)
    positions = module.positions["train"] if name == "cvfp_phase1" else module.positions
    first, second = (positions.__getitems__(list(range(start, start + 20))) for start in (0, 20))
    step(module, optimizer, first)
    on_device = [*module.parameters(), *[tensor for key, tensor in second.items() if key not in HOST]]

    with Waits(on_device) as waits:
        step(module, optimizer, second)

    assert not waits.found


def test_reading_a_number_is_found() -> None:
    weight = torch.ones(2, requires_grad=True)

    with Waits([weight]) as waits:
        if (2 * weight).sum() > 1:
            torch.zeros(3)[torch.zeros(3) > 1]  # of the host alone
        weight.detach()[weight.detach() > 1]

    assert waits.found == {"aten::_local_scalar_dense", "aten::index"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [*PROCEDURES, "lct-cache"])
def test_a_training_step_does_not_synchronise_on_cuda(name: str, tmp_path: Path) -> None:
    overrides = PROCEDURES.get(name, ["model=infini", "trainer=lct", "trainer.cache=ram"])
    module, optimizer, batch = prepared(overrides, tmp_path, "cuda")
    for _ in range(2):
        step(module, optimizer, batch)

    torch.cuda.set_sync_debug_mode("error")
    try:
        step(module, optimizer, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
