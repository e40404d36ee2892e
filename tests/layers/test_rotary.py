"""Rotary position embedding."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from newllm.layers.rotary import _factors, rotate
from newllm.models.create import create_model


def test_scores_depend_on_distances_only():
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.randn(2, 3, 5, 8, dtype=torch.float64)

    def scores(offset: int) -> torch.Tensor:
        turned = [rotate(part, offset=offset, rotary_dim=4, base=10000.0) for part in (queries, keys)]
        return turned[0] @ turned[1].transpose(-1, -2)

    torch.testing.assert_close(scores(0), scores(1000), atol=1e-10, rtol=0)


def test_tables_first_made_in_inference_mode_serve_training():
    queries = torch.randn(1, 1, 3, 8, requires_grad=True)
    # A base of its own, so that no other test has made the table.
    with torch.inference_mode():
        rotate(torch.randn(1, 1, 3, 8), offset=0, rotary_dim=4, base=12345.0)

    rotate(queries, offset=0, rotary_dim=4, base=12345.0).sum().backward()

    assert queries.grad is not None


@pytest.mark.parametrize("rotary_dim", [2, 4, 8])
def test_pairs_of_dims_turn_by_the_angle_of_their_position(rotary_dim: int):
    heads = torch.randn(2, 3, 5, 8, dtype=torch.float64)

    turned = rotate(heads, offset=7, rotary_dim=rotary_dim, base=100.0)

    half = rotary_dim // 2
    angles = torch.arange(7.0, 12.0, dtype=torch.float64)[:, None] * 100.0 ** -(torch.arange(half) / half)
    pairs = torch.complex(heads[..., :half], heads[..., half:rotary_dim])
    expected = pairs * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(turned[..., :half], expected.real)
    torch.testing.assert_close(turned[..., half:rotary_dim], expected.imag)
    assert torch.equal(turned[..., rotary_dim:], heads[..., rotary_dim:])


def test_gradients_of_first_and_second_order():
    heads = torch.randn(1, 2, 3, 8, dtype=torch.float64, requires_grad=True)

    def strided(tensor):
        return rotate(tensor.transpose(1, 2).contiguous().transpose(1, 2), offset=2, rotary_dim=4, base=10.0)

    assert torch.autograd.gradcheck(strided, heads)
    assert torch.autograd.gradgradcheck(strided, heads)


def test_an_exported_model_leaves_nothing_behind_for_the_next_call():
    model, ids = (
        create_model("pythia", vocab_size=32, seed=0, dim=16, num_layers=1, num_heads=2, rotary_base=54321.0),
        torch.zeros(1, 5, dtype=torch.int64),
    )

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids).logits

    with torch.no_grad():
        exported = torch.export.export(Logits(), (ids,)).module()(ids)

    logits = model(ids).logits

    assert type(logits) is torch.Tensor
    torch.testing.assert_close(exported, logits.detach(), atol=1e-5, rtol=0)
    logits.sum().backward()


def test_numbers_of_a_tracer_are_not_kept():
    given = {"offset": 0, "rotary_dim": 4, "base": 65432.1}
    with FakeTensorMode():
        rotate(torch.ones(1, 1, 3, 4), **given)

    assert type(rotate(torch.ones(1, 1, 3, 4), **given)) is torch.Tensor


def test_factors_are_kept_for_tensors_of_other_types():
    class Wrapped(torch.Tensor):
        pass

    made = _factors.cache_info().misses
    for _ in range(2):
        rotate(torch.ones(1, 1, 3, 4).as_subclass(Wrapped), offset=0, rotary_dim=4, base=76543.2)

    assert _factors.cache_info().misses == made + 1


def test_compiling_gives_no_warning(recwarn):
    torch._dynamo.reset()

    turned = torch.compile(
        lambda heads: rotate(heads, offset=0, rotary_dim=4, base=87654.3), backend="eager", fullgraph=True
    )
    turned(torch.ones(1, 1, 3, 4))

    assert not [warning for warning in recwarn if "lru_cache" in str(warning.message)]
