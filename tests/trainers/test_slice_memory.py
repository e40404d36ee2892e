"""What a slice takes: no more than is measured, told before the run, refused where there is less."""

import logging

import psutil
import pytest
import torch
from small_cvfp import small_procedure

from bench.measure import peak_bytes
from newllm.trainers.context_stream import context_map, slices
from newllm.trainers.slice_memory import slice_bytes

DEEP = ("model.num_layers=2", "model.ffn_layers=2", "model.num_input_tokens=2", "model.context_dim=64", "size.dim=32")


@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("options", [("model.context_dim=64",), DEEP], ids=["one layer", "deep"])
def test_a_slice_takes_at_least_what_is_told_and_not_several_times_as_much(
    options: tuple[str, ...], is_trained: bool
) -> None:
    model = small_procedure("cvfp_phase1", *options).model
    procedure = small_procedure("cvfp_phase1", *options)
    batch = next(slices(procedure.positions["train"], 120, device=torch.device("cpu")))

    def step() -> None:
        previous = torch.zeros(1, 120, 64)  # noise for them is drawn beside it
        with torch.set_grad_enabled(is_trained):
            new = context_map(model, batch, noise=0.1)(previous)
        if is_trained:
            new.square().mean().backward()

    told = slice_bytes(model, 120, is_trained=is_trained)

    step()  # gradients of the weights are there from now on
    assert told <= peak_bytes(step) <= 3 * told


def free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    memory = psutil.virtual_memory()._replace(available=num_bytes)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


@pytest.mark.parametrize("trainer", ["cvfp", "cvfp_phase1"])
def test_slices_larger_than_memory_are_refused_with_the_longest_that_fits(
    trainer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 7000)

    with pytest.raises(
        ValueError, match=r"a slice of 50 positions takes at least .* GiB, there are .* of it, 43 positions"
    ):
        small_procedure(trainer)
    small_procedure(trainer, "trainer.slice_tokens=43")


@pytest.mark.parametrize("options", [("cvfp_phase2", "trainer.phase1=untrained"), ("cvfp", "trainer.max_iterations=0")])
def test_slices_without_gradients_take_less(options: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 7000)
    small_procedure(*options)
    free(monkeypatch, 6000)

    with pytest.raises(ValueError, match=r"trainer\.slice_tokens: a slice of 50 positions"):
        small_procedure(*options)


def test_on_a_gpu_its_own_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7000, 8000))

    with pytest.raises(ValueError, match=r"free on the GPU\. Allowed: at most 90% of it, 43 positions"):
        small_procedure("cvfp_phase1", "runtime=gpu")


def test_bytes_are_told_before_the_first_iteration(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        small_procedure("cvfp_phase1")

    assert "120 positions x 4 values x 4 bytes = 1,920 bytes (ram)" in caplog.text
    assert "a slice of 50 positions takes at least 7,200 bytes" in caplog.text
