from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from newllm.state import State, by_groups, merge_rows, tensors_of


@dataclass(frozen=True)
class Part(State):
    keys: Tensor = field(metadata={"ragged": True})
    lengths: tuple[int, ...]
    frozen: tuple[bool, ...] = field(metadata={"shared": True})


@dataclass(frozen=True)
class Whole(State):
    parts: tuple[Part, ...]
    matrix: Tensor


def example(rows: int = 3) -> Whole:
    keys = torch.arange(1.0, rows * 4 + 1).view(rows, 1, 2, 2)
    part = Part(keys, tuple(range(1, rows + 1)), (True, False))
    return Whole((part, part), torch.ones(rows, 5))


def test_reset_empties_the_marked_rows_and_leaves_the_value_it_came_from():
    state = example()

    fresh = state.reset(torch.tensor([False, True, False]))

    assert fresh.matrix.tolist() == [[1] * 5, [0] * 5, [1] * 5]
    assert fresh.parts[0].lengths == (1, 0, 3)
    assert fresh.parts[1].keys[1].abs().sum() == 0
    assert fresh.parts[0].frozen == (True, False)
    assert state.matrix.sum() == 15


def test_select_and_merge_are_inverse():
    state = example()

    merged = merge_rows([([2, 0], state.select([2, 0])), ([1], state.select([1]))])

    for name, tensor in tensors_of(state).items():
        assert torch.equal(tensors_of(merged)[name], tensor), name


def test_merged_rows_of_unequal_length_are_aligned_on_the_right():
    short = Part(torch.full((1, 1, 1, 2), 7.0), (1,), (False,))
    long = Part(torch.full((1, 1, 3, 2), 8.0), (3,), (False,))

    merged = merge_rows([([0], short), ([1], long)])

    assert merged.keys[0, 0].tolist() == [[0, 0], [0, 0], [7, 7]]
    assert merged.lengths == (1, 3)


def test_detach_cuts_the_graph():
    weight = torch.ones(3, 5, requires_grad=True)

    assert not Whole(example().parts, weight * 2).detach().matrix.requires_grad


def test_to_changes_floating_tensors_only():
    @dataclass(frozen=True)
    class Mixed(State):
        weights: Tensor
        is_set: Tensor

    moved = Mixed(torch.ones(2), torch.tensor([True, False])).to(torch.float64)

    assert (moved.weights.dtype, moved.is_set.dtype) == (torch.float64, torch.bool)


def test_nbytes_counts_every_tensor():
    assert example().nbytes == (2 * 3 * 4 + 3 * 5) * 4


def test_save_and_load_round_trip_is_exact(tmp_path):
    state = example()
    state.save(tmp_path / "state.safetensors")

    loaded = example(rows=3).reset([True] * 3).load(tmp_path / "state.safetensors")

    assert loaded.parts[0].frozen == (True, False)
    assert loaded.parts[1].lengths == state.parts[1].lengths
    assert torch.equal(loaded.matrix, state.matrix)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_loading_a_damaged_file_says_which(tmp_path):
    example().save(tmp_path / "state.safetensors")
    content = (tmp_path / "state.safetensors").read_bytes()
    (tmp_path / "state.safetensors").write_bytes(content[: len(content) // 2])

    with pytest.raises(ValueError, match=r"state\.safetensors: is damaged"):
        example().load(tmp_path / "state.safetensors")


def test_loading_another_structure_names_the_difference(tmp_path):
    example().parts[0].save(tmp_path / "part.safetensors")

    with pytest.raises(ValueError, match=r"holds another structure .*matrix"):
        example().load(tmp_path / "part.safetensors")


def test_groups_of_rows_run_apart_and_come_back_in_order():
    calls = []

    def forward(hidden: Tensor, state: Part) -> tuple[Tensor, Part]:
        calls.append(hidden.shape[0])
        return hidden * state.lengths[0], state

    state = Part(torch.zeros(4, 1, 2, 2), (2, 5, 2, 5), (False,))

    output, after = by_groups(forward, torch.ones(4, 1, 1), state, state.lengths)

    assert output.flatten().tolist() == [2, 5, 2, 5]
    assert after.lengths == (2, 5, 2, 5)
    assert calls == [2, 2]


def test_saving_makes_the_folders_on_the_way(tmp_path):
    path = tmp_path / "new" / "folder" / "state.safetensors"

    example().save(path)

    assert torch.equal(example().load(path).matrix, example().matrix)


def test_saving_where_no_file_can_be_names_the_path_that_was_given(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(ValueError, match=rf"^{tmp_path}: is a folder\. Allowed: .* save it elsewhere\.$"):
        example().save(tmp_path)
    below = tmp_path / "file" / "state.safetensors"
    with pytest.raises(ValueError, match=rf"^{below}: cannot be written \(a folder on the way is a file\)\."):
        example().save(below)


@pytest.mark.parametrize("mask", [[True], [False, False], [True] * 4])
def test_a_mask_of_other_rows_is_refused(mask: list[bool]):
    with pytest.raises(ValueError, match=rf"reset: was told of {len(mask)} rows, the state holds 3\."):
        example().reset(mask)
