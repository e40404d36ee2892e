"""Products by oneDNN give what torch's own give; where they do not, they are not used."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from newllm import linear as module
from newllm import processor
from newllm.linear import Linear, is_onednn_faster, linear, multiply, outer

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda matrix: matrix,
    "columns": lambda matrix: matrix.T.contiguous().T,
    "part of wider rows": lambda matrix: torch.cat([matrix, matrix], dim=1)[:, : matrix.shape[1]],
    "one row in many": lambda matrix: matrix[:1].expand(matrix.shape),
    "one number": lambda matrix: matrix[:1, :1].expand(matrix.shape),
}


@pytest.fixture
def only_onednn() -> Iterator[list[tuple[int, ...]]]:
    """Every fp32 product is oneDNN's, on whatever processor; its sizes (M, K, N) are noted."""
    with pytest.MonkeyPatch.context() as patch:
        yield use_only_onednn(patch)


def use_only_onednn(patch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    sizes = []
    products = module._onednn

    def noted(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        sizes.append((*left.shape, len(right)))
        return products(left, right, bias)

    patch.setattr(module, "_onednn", noted)
    patch.setattr(module, "is_onednn_faster", lambda: True)
    patch.setattr(module, "least_multiplications", lambda **_: 0)
    patch.setattr(module, "LEAST_RESULTS", 0)
    return sizes


@needs_onednn
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 70)),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_sizes_and_layouts_give_torchs_products_and_gradients(
    sizes: tuple[int, int, int], layouts: tuple[str, str, str], with_bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, width, outputs = sizes
    shapes = [(rows, width), (outputs, width), (rows, outputs)]
    inputs, weight, by_output = (
        LAYOUTS[layout](torch.randn(shape, generator=generator)) for shape, layout in zip(shapes, layouts, strict=True)
    )
    bias = torch.randn(outputs, generator=generator, requires_grad=True) if with_bias else None
    wanted = [inputs.requires_grad_(), weight.requires_grad_(), *([] if bias is None else [bias])]

    with pytest.MonkeyPatch.context() as patch:
        used = use_only_onednn(patch)
        ours = linear(inputs, weight, bias)
        own_gradients = torch.autograd.grad(ours, wanted, by_output)
        multiplied, summed = multiply(inputs, weight, bias), outer(by_output, inputs)
    theirs = nn.functional.linear(inputs, weight, bias)

    assert len(used) == 5  # there, to the inputs, to the weight; multiply, outer
    pairs = [(ours, theirs), (multiplied, theirs), (summed, by_output.T @ inputs)]
    pairs += zip(own_gradients, torch.autograd.grad(theirs, wanted, by_output), strict=True)
    for own, other in pairs:
        assert own.shape == other.shape
        assert (own - other).norm() <= 1e-5 * other.norm() + 1e-6


@needs_onednn
def test_gradients_can_be_differentiated(only_onednn: list) -> None:
    inputs, weight = torch.randn(2, 3, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)

    def curvature(product: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        outputs = product(inputs, weight)
        gradients = torch.autograd.grad(outputs.square().sum(), (inputs, weight), create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), (inputs, weight))

    for own, other in zip(curvature(linear), curvature(nn.functional.linear), strict=True):
        assert (own - other).norm() <= 1e-5 * other.norm()


@needs_onednn
def test_what_needs_no_gradient_is_not_multiplied(only_onednn: list) -> None:
    layer = Linear(5, 7).requires_grad_(False)
    inputs = torch.randn(3, 5, requires_grad=True)

    layer(inputs).sum().backward()
    assert only_onednn == [(3, 5, 7), (3, 7, 5)]

    with torch.inference_mode():
        layer(inputs)
    assert only_onednn[2:] == [(3, 5, 7)]


@pytest.mark.parametrize(
    ("product", "reason"),
    [
        (lambda a, b: linear(a.double(), b.double()), "digits"),
        (lambda a, b: linear(a.bfloat16(), b.bfloat16()), "torch takes oneDNN itself"),
        (lambda a, b: linear(a[:2], b), "few results"),
        (lambda a, b: linear(a[:128], b), "small"),
        (lambda a, b: linear(a, b[:8]), "few results"),
        (lambda a, b: outer(a, b.repeat(2, 1)), "to be turned"),
    ],
)
def test_what_would_not_gain_is_torchs(product: Callable, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_onednn_faster", lambda: True)
    monkeypatch.setattr(module, "least_multiplications", lambda *, turned: 2**26 if turned else 2**24)
    monkeypatch.setattr(module, "_onednn", lambda *_: pytest.fail(reason))

    product(torch.randn(512, 256), torch.randn(256, 256))


@needs_onednn
def test_autocast_and_the_switch_of_torch_are_minded(only_onednn: list) -> None:
    layer, inputs = Linear(5, 7), torch.randn(3, 5)

    with torch.autocast("cpu", torch.bfloat16):
        assert layer(inputs).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        layer(inputs)
    assert only_onednn == []

    layer(inputs)
    assert len(only_onednn) == 1


@pytest.fixture
def on_amd(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A processor that the products of oneDNN are faster on, whatever this one is."""
    (tmp_path / "cpuinfo").write_text("vendor_id : AuthenticAMD\ncpu family : 26\nflags : avx2 avx512f")
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    is_onednn_faster.cache_clear()
    yield
    is_onednn_faster.cache_clear()


@needs_onednn
def test_products_are_left_to_onednn_where_mkl_is_slow(on_amd: None, tmp_path, monkeypatch) -> None:
    before = torch.get_rng_state()
    assert is_onednn_faster()
    assert torch.equal(before, torch.get_rng_state())

    is_onednn_faster.cache_clear()
    (tmp_path / "cpuinfo").write_text("vendor_id : GenuineIntel\nflags : avx2 avx512f")
    assert not is_onednn_faster()

    is_onednn_faster.cache_clear()
    (tmp_path / "cpuinfo").write_text("vendor_id : AuthenticAMD\ncpu family : 25\nflags : avx2")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not is_onednn_faster()


@needs_onednn
@pytest.mark.parametrize("fault", ["wrong", "missing"])
def test_a_product_that_is_wrong_or_missing_is_not_used(fault: str, on_amd: None, monkeypatch, caplog) -> None:
    def missing(*_: object) -> Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    right = module._onednn
    wrong = lambda *given: right(*given) * 1.01  # noqa: E731
    monkeypatch.setattr(module, "_onednn", wrong if fault == "wrong" else missing)

    assert not is_onednn_faster()

    (message,) = caplog.messages
    assert message.startswith("Large products stay with MKL, oneDNN's cannot be used with torch")
    assert ("no attribute" if fault == "missing" else "not close") in message
    inputs, weight = torch.randn(512, 256), torch.randn(256, 256)
    assert torch.equal(linear(inputs, weight), nn.functional.linear(inputs, weight))
