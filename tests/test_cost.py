"""What is told of memory when there is too little of it."""

import re
from pathlib import Path

import psutil
import pytest
import torch

from newllm.config.compose import compose
from newllm.config.typed import real_config
from newllm.cost import check_memory, describe_cost, out_of_memory
from newllm.losses.next_token import NextTokenLoss
from newllm.run import run_training

PROBE = [
    *("model=pythia", "size.dim=16", "size.num_layers=1", "size.num_heads=2", "size.mlp_dim=32"),
    *("data=delay_copy", "data.block_length=8", "data.num_samples=40", "data.batch_size=4", "data.eval_batch_size=4"),
    *(
        "trainer.max_steps=2",
        "trainer.validate_every_steps=2",
        "trainer.checkpoint_every_steps=2",
        "guards=off",
        "schedule.warmup_steps=1",
    ),
]


LAGGED = ["model=infini", "layers=all_infini", "trainer=lct"]


def told(*overrides: str) -> str:
    return out_of_memory(real_config(compose(["model=pythia", *overrides])), 4096)


def has(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    memory = type("Memory", (), {"total": gib * 2**30, "available": gib * 2**30})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def test_rows_that_fit_divide_the_batch_and_make_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, 1)

    said = told("data.batch_size=96", "data.block_length=512", "trainer.accumulate_batches=2")

    found = re.fullmatch(
        r"data.batch_size=96: a step of 96 x 512 tokens does not fit the 1\.0 GiB of this machine\. Allowed: about ([\d, ]+)\. "
        r"Set data.batch_size=(\d+) and trainer.accumulate_batches=(\d+), which make the same steps\.",
        said,
    )
    assert found is not None, said
    rows, batches = int(found[2]), int(found[3])
    assert found[1].split(", ")[-1] == str(rows)
    assert rows * batches == 96 * 2
    assert 1 < rows < 96


def test_where_one_row_is_too_much_shorter_blocks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, 1)

    assert told("data.batch_size=1").endswith("Choose a smaller data.block_length or size.")


def test_a_model_that_does_not_fit_is_refused_with_the_sizes_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, 0.5)
    config = real_config(compose(["model=pythia", "size=pythia_410m"]))

    with pytest.raises(ValueError, match=r"Allowed: what fits, of the named sizes size=nano, size=small\. Choose a"):
        check_memory(config, 50304)


def test_a_run_that_finds_no_memory_says_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(NextTokenLoss, "forward", full)
    given = [*PROBE, f"data.cache_dir={tmp_path / 'cache'}"]

    with pytest.raises(
        torch.OutOfMemoryError, match=r"data.batch_size=4: a step of 4 x 8 tokens .* Set data.batch_size="
    ):
        run_training(compose(given), tmp_path / "run", given)

    assert "which make the same steps" in (tmp_path / "run" / "FAILED").read_text()


@pytest.mark.parametrize(("cache", "is_kept"), [("ram", True), ("disk", False), ("none", False)])
def test_cost_counts_a_lagged_cache_in_ram_as_memory(
    monkeypatch: pytest.MonkeyPatch, cache: str, is_kept: bool
) -> None:
    monkeypatch.setattr("newllm.cost.cache_bytes", lambda *_: 3 * 2**30)

    line = describe_cost(real_config(compose([*PROBE, *LAGGED, f"trainer.cache={cache}"]))).splitlines()[-1]

    assert line.startswith("memory, about ")
    assert ("with 3,072 MiB of kept states" in line) == is_kept
    assert (" 3,07" in line.split(" MiB ")[0]) == is_kept


def test_cost_of_a_gpu_run_counts_the_lagged_cache_in_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("newllm.cost.cache_bytes", lambda *_: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    lines = describe_cost(real_config(compose([*PROBE, *LAGGED, "runtime=gpu"]))).splitlines()[-2:]

    assert re.fullmatch(r"GPU memory, about +\d MiB", lines[0])
    assert re.match(r"RAM, about +3,072 MiB of kept states; program and data take [\d,]+ MiB besides", lines[1])


def test_a_model_whose_weights_cannot_be_numbered_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^model: one of its weights has more bytes than can be numbered\."):
        check_memory(real_config(compose(["model=pythia", "model.dim=1000000000000"])), 100)


def test_a_step_never_reads_more_than_an_epoch() -> None:
    def told_steps(*overrides: str) -> dict[str, str]:
        lines = describe_cost(real_config(compose([*PROBE, "data.validation_share=0.25", *overrides]))).splitlines()
        return {line.split("  ")[0]: line.split("  ")[-1].strip() for line in lines}

    once, many = told_steps("trainer.accumulate_batches=2"), told_steps("trainer.accumulate_batches=1000")
    (blocks,) = re.findall(r"of (\d+) blocks", many["steps"])

    assert "of 8 blocks of 8 tokens" in once["steps"]
    assert int(blocks) < 40  # data.num_samples
    assert many["visits per sample"].startswith("2.00 ")
