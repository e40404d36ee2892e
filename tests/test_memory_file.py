"""Files that must be refused, with the reason and nothing changed."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_sessions import model, session

from newllm.memory_file import fingerprint


@pytest.fixture
def saved(tmp_path):
    reader = session()
    reader.read("In the beginning God created the heaven")
    reader.save(tmp_path / "memory.safetensors")
    return tmp_path / "memory.safetensors"


def refused(path, match, **options):
    reader = session(**options)
    reader.read("before")
    before = reader.state

    with pytest.raises(ValueError, match=match):
        reader.load(path)

    assert reader.state is before


def rewrite(path, *, header=None, tensors=None):
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **(header or {})}
    save_file({**load_file(path), **(tensors or {})}, path, metadata=metadata)


def test_other_weights_are_refused_with_both_fingerprints(saved):
    theirs, ours = fingerprint(model()), fingerprint(model(seed=2))

    refused(saved, f"is the memory of model {theirs}, this is model {ours} .other weights", seed=2)


def test_other_kernel_is_named(saved):
    refused(saved, "kernel: elu there, ridge here", memory_kernel="ridge", write=None)


def test_other_number_of_banks_is_named(saved):
    refused(saved, "banks: 2 there, 3 here", num_memory_banks=3)


def test_other_write_rule_is_named(saved):
    refused(saved, "write: linear there, delta here", write="delta")


def test_other_option_alone_makes_another_fingerprint():
    assert fingerprint(model()) == fingerprint(model())
    assert fingerprint(model()) != fingerprint(model(segments_per_bank=3))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_file_is_refused(saved, share):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(share * len(whole))])

    refused(saved, "cannot be read as a memory file")


def test_missing_file_is_refused(tmp_path):
    refused(tmp_path / "none.safetensors", "cannot be read as a memory file")


def test_nan_is_refused(saved):
    name = "layers.0.memory.matrix"
    rewrite(saved, tensors={name: torch.full_like(load_file(saved)[name], float("nan"))})

    refused(saved, f"{name} holds NaN")


def test_other_version_is_refused(saved):
    rewrite(saved, header={"format": "99"})

    refused(saved, "has format version 99. Allowed: 1")


def test_other_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(2)}, path)

    refused(path, "is no memory file")


def test_other_shape_is_refused(saved):
    rewrite(saved, tensors={"layers.0.memory.norm": torch.zeros(1, 2, 1, 5)})

    refused(saved, r"layers\.0\.memory\.norm has shape \[1, 2, 1, 5\]\. Allowed: \[1, 2, 1, 8\]")


@pytest.mark.parametrize(("counter", "value"), [("current_bank", 2), ("current_bank", -1), ("open_lengths", 4)])
def test_counter_out_of_range_is_refused(saved, counter, value):
    rewrite(saved, tensors={f"layers.0.{counter}": torch.tensor([value])})

    refused(saved, rf"layers\.0\.{counter} is {value}")


def test_exported_banks_are_not_taken_for_a_whole_memory(tmp_path):
    session().export([0], tmp_path / "bank.safetensors")

    refused(tmp_path / "bank.safetensors", r"holds 1 exported banks.*into=\[\.\.\.\] of 1")


def test_number_of_banks_and_places_must_agree(tmp_path):
    reader = session()
    reader.export([0], tmp_path / "bank.safetensors")

    with pytest.raises(ValueError, match=r"holds 1 banks of layers\.0, into=\[0, 1\] names 2"):
        reader.load(tmp_path / "bank.safetensors", into=[0, 1])


def test_memory_with_nan_is_not_saved(tmp_path):
    reader = session()
    reader.model.embedding.weight.data.fill_(float("nan"))
    reader.read("abcdef")

    with pytest.raises(ValueError, match="holds NaN or infinity and is not saved"):
        reader.save(tmp_path / "memory.safetensors")

    assert not list(tmp_path.iterdir())


def test_header_tells_shapes_counters_kernel_and_version(saved):
    with safe_open(saved, framework="pt") as file:
        header = file.metadata()

    assert header["format"] == "1"
    assert json.loads(header["counters"])["positions"] == [39]
    assert json.loads(header["memories"]) == [{"kernel": "elu", "write": "linear", "banks": 2, "shape": [1, 8, 8]}]
    assert json.loads(header["shapes"])["layers.0.memory.matrix"] == [[1, 2, 1, 8, 8], "torch.float32"]
