"""What every option of conf/model must do; a model added there is tested here by itself."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from newllm.config.compose import compose_model
from newllm.config.library import options
from newllm.models.base import LanguageModel, count_parameters
from newllm.models.create import create_model

VOCABULARY = 31
SEGMENT = 4
LENGTHS = [1, 2, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT + 1]


def variants() -> list[tuple[str, str]]:
    """Every model, and each way it can feed its state back."""
    found = []
    for name in options("model"):
        model = compose_model(name, size="nano", keys={}).model
        kinds = ["none", "additive", "gated"] if hasattr(model, "feedback") else [""]
        found += [(name, kind) for kind in kinds]
    return found


def small(name: str, feedback: str) -> LanguageModel:
    """The model with short segments and weights that make every part do something."""
    composed = compose_model(name, size="nano", keys={})
    keys: dict[str, Any] = {"feedback": feedback} if feedback else {}
    parameters = {field.name for kind in composed.layers.kinds.values() for field in dataclasses.fields(kind)}
    if "segment_length" in parameters:
        keys["segment_length"] = SEGMENT
    model = create_model(name, vocab_size=VOCABULARY, seed=1, **keys).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter_name, parameter in model.named_parameters():
        if "projection" in parameter_name or parameter.dim() < 2:
            nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.1, generator=generator)
    return model


@pytest.fixture(params=variants(), ids=lambda variant: "-".join(part for part in variant if part), scope="module")
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return small(*request.param)


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def in_pieces(model: LanguageModel, input_ids: Tensor, pieces: int) -> tuple[Tensor, Any]:
    state, logits = None, []
    for piece in torch.tensor_split(input_ids, pieces, dim=1):
        output = model(piece, state)
        state = output.state
        logits.append(output.logits)
    return torch.cat(logits, dim=1), state


@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_full_pass_equals_chunks_and_single_tokens(model: LanguageModel, length: int):
    input_ids = tokens(2, length)

    full = model(input_ids).logits

    for pieces in sorted({min(3, length), length}):
        assert (in_pieces(model, input_ids, pieces)[0] - full).abs().max() < 1e-5


@torch.no_grad()
def test_no_position_sees_a_later_token_with_a_memory_that_is_not_empty(model: LanguageModel):
    state = model(tokens(2, 2 * SEGMENT + 1, seed=1)).state
    input_ids = tokens(2, 2 * SEGMENT + 2)
    changed = input_ids.clone()
    changed[:, SEGMENT:] = (changed[:, SEGMENT:] + 1) % VOCABULARY

    before, after = model(input_ids, state).logits, model(changed, state).logits

    assert (before[:, :SEGMENT] - after[:, :SEGMENT]).abs().max() < 1e-6
    assert (before[:, SEGMENT:] - after[:, SEGMENT:]).abs().max() > 1e-4


@torch.no_grad()
def test_rows_do_not_mix(model: LanguageModel):
    input_ids = tokens(3, 2 * SEGMENT + 1)

    together = model(input_ids).logits

    for row in range(3):
        assert (model(input_ids[row : row + 1]).logits - together[row : row + 1]).abs().max() < 1e-5


@torch.no_grad()
def test_a_call_leaves_nothing_behind(model: LanguageModel):
    input_ids, before = tokens(2, SEGMENT + 2), {name: t.clone() for name, t in model.state_dict().items()}
    state = model(tokens(2, SEGMENT + 1, seed=3)).state

    first = model(input_ids, state).logits
    model(tokens(2, SEGMENT, seed=4), state)

    assert torch.equal(model(input_ids, state).logits, first)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name for name, _ in model.named_buffers()} <= set(before)


@torch.no_grad()
def test_a_reset_row_begins_anew_and_the_others_go_on(model: LanguageModel):
    first, second = tokens(2, SEGMENT + 2, seed=5), tokens(2, 2 * SEGMENT + 1, seed=6)
    state = model(first).state

    output = model(second, state.reset(torch.tensor([True, False]))).logits

    assert (output[:1] - model(second[:1]).logits).abs().max() < 1e-5
    assert (output[1:] - model(second, state).logits[1:]).abs().max() < 1e-5


@torch.no_grad()
def test_a_saved_state_continues_as_the_one_in_memory(model: LanguageModel, tmp_path):
    state, input_ids = model(tokens(2, SEGMENT + 2)).state, tokens(2, SEGMENT, seed=7)
    state.save(tmp_path / "state.safetensors")

    loaded = model.initial_state(2).load(tmp_path / "state.safetensors")

    assert torch.equal(model(input_ids, loaded).logits, model(input_ids, state).logits)


@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_the_formula_of_state_bytes_counts_the_real_tensors(model: LanguageModel, length: int):
    assert model(tokens(2, length)).state.nbytes == 2 * model.state_bytes(length)


@pytest.mark.parametrize("length", [1, SEGMENT, 3 * SEGMENT + 1])
@torch.no_grad()
def test_the_formula_of_flops_counts_what_is_multiplied(model: LanguageModel, length: int):
    input_ids, state = tokens(2, length), model.initial_state(2)
    previous = {"previous_hidden": torch.zeros(2, length, model.dim)} if model.has_feedback else {}

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(input_ids, state, **previous)

    assert counter.get_total_flops() == pytest.approx(2 * length * model.flops_per_token(length), rel=1e-6)


@torch.no_grad()
def test_float64_agrees_with_float32_and_is_exact_in_pieces(model: LanguageModel):
    input_ids = tokens(2, 2 * SEGMENT + 1)
    single = model(input_ids).logits
    double = model.double()
    try:
        full = double(input_ids).logits
        pieces = in_pieces(double, input_ids, input_ids.shape[1])[0]
    finally:
        model.float()

    assert full.dtype == torch.float64
    assert (full - single).abs().max() < 1e-4
    assert (full - pieces).abs().max() < 1e-10


def test_linear_maps_are_multiplied_by_the_faster_product(model: LanguageModel):
    assert [name for name, part in model.named_modules() if type(part) is nn.Linear] == []


def test_every_parameter_is_counted_once(model: LanguageModel):
    counted = count_parameters(model)

    assert counted["total"] == sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def test_calls_that_cannot_be_meant_are_refused(model: LanguageModel):
    with pytest.raises(ValueError, match=r"input_ids: has shape"):
        model(tokens(2, 3)[0])
    with pytest.raises(ValueError, match=r"state: holds 3 texts, input_ids 2"):
        model(tokens(2, 3), model.initial_state(3))
    for wrong in (tokens(2, 3) - VOCABULARY, tokens(2, 3) + VOCABULARY, tokens(2, 3).float()):
        with pytest.raises(ValueError, match=r"input_ids: are torch\.\w+ of .* Allowed: integers of 0 to 30\."):
            model(wrong)
    if not model.has_feedback:
        with pytest.raises(ValueError, match="previous_hidden: was given to a model without feedback"):
            model(tokens(2, 3), previous_hidden=torch.zeros(2, 3, 4))


def recurrences() -> list[tuple[str, dict[str, Any]]]:
    """Every model that feeds its state back, as it is and with layers that see nothing but their own position."""
    found: list[tuple[str, dict[str, Any]]] = [(name, {"feedback": kind} if kind else {}) for name, kind in variants()]
    found += [(name, {**keys, "window": 1}) for name, keys in found if keys and has_window(name)]
    return [(name, keys) for name, keys in found if compose_model(name, size="nano", keys=keys).model.has_feedback]


def has_window(name: str) -> bool:
    kinds = compose_model(name, size="nano", keys={}).layers.kinds.values()
    return any(field.name == "window" for kind in kinds for field in dataclasses.fields(kind))


@pytest.mark.parametrize(("name", "keys"), recurrences(), ids=str)
def test_a_model_says_whether_earlier_states_come_through_the_fed_back_one_alone(name: str, keys: dict[str, Any]):
    composed = compose_model(name, size="nano", keys=keys)
    model = create_model(name, vocab_size=VOCABULARY, seed=1, **keys).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    input_ids, position = tokens(1, 3 * SEGMENT), 2 * SEGMENT
    previous = torch.randn(1, 3 * SEGMENT, model.dim, dtype=torch.float64, requires_grad=True)

    state = model.encode(input_ids, model.initial_state(1), previous_hidden=previous).hidden
    (by_previous,) = torch.autograd.grad(state[:, position, : model.carried_dim].sum(), previous)

    read = [t for t in range(3 * SEGMENT) if by_previous[:, t].abs().max() > 0]
    assert max(read) == position
    assert (read == [position]) == composed.model.is_pointwise(composed.layers)
    assert by_previous[..., model.carried_dim :].abs().sum() == 0


@pytest.mark.parametrize("number", [0, -1, 1.5, "x", True])
def test_a_vocabulary_that_is_no_number_of_tokens_is_refused(number: Any):
    with pytest.raises(
        ValueError, match=rf"vocab_size={number}: is no number of tokens\. Allowed: integers of at least 1"
    ):
        create_model("pythia", vocab_size=number)
