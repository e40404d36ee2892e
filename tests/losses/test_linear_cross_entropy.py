from typing import Any

import pytest
import torch
from torch import Tensor, nn

from newllm.config.library import options
from newllm.losses import linear_cross_entropy
from newllm.losses.linear_cross_entropy import NO_TARGET, mean_nats, row_nats, rows_at_once
from newllm.losses.next_token import NextTokenConfig, NextTokenLoss, token_nats
from newllm.models.create import create_model

ROWS, FEATURES, VOCABULARY = 11, 5, 37


def made(dtype: torch.dtype = torch.float32, *, with_bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    features = torch.randn(ROWS, FEATURES, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, FEATURES, dtype=dtype, requires_grad=True)
    bias = torch.randn(VOCABULARY, dtype=dtype, requires_grad=True) if with_bias else None
    targets = torch.randint(VOCABULARY, (ROWS,))
    targets[[0, 4, 10]] = NO_TARGET
    return features, weight, bias, targets


def plain_mean(features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(nn.functional.linear(features, weight, bias), targets, ignore_index=NO_TARGET)


@pytest.mark.parametrize("rows", [1, 3, 4, ROWS, 99])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("factor", [1, 3], ids=["the loss", "a multiple, as accumulation takes"])
def test_chunks_give_the_loss_and_gradients_of_whole_logits(rows: int, with_bias: bool, factor: int) -> None:
    *inputs, targets = made(with_bias=with_bias)
    wanted = [tensor for tensor in inputs if tensor is not None]

    plain = plain_mean(*inputs, targets)
    chunked = mean_nats(*inputs, targets, rows=rows)

    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=0)
    multiples = (factor * chunked, factor * plain)
    pairs = zip(*(torch.autograd.grad(multiple, wanted) for multiple in multiples), strict=True)
    for ours, theirs in pairs:
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_chunks_pass_gradcheck_in_float64() -> None:
    features, weight, bias, targets = made(torch.float64)

    assert torch.autograd.gradcheck(lambda f, w, b: mean_nats(f, w, b, targets, rows=4), (features, weight, bias))
    assert torch.autograd.gradcheck(lambda f, w, b: row_nats(f, w, b, targets, rows=4), (features, weight, bias))


def test_graph_can_be_differentiated_twice_when_kept() -> None:
    features, weight, _, targets = made()
    loss = mean_nats(features, weight, None, targets, rows=4)

    first = torch.autograd.grad(loss, [features, weight], retain_graph=True)
    second = torch.autograd.grad(loss, [features, weight])

    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_rows_have_the_cross_entropy_of_whole_logits() -> None:
    features, weight, bias, targets = made()
    weights = torch.rand(ROWS)

    chunked = row_nats(features, weight, bias, targets, rows=4)
    logits = nn.functional.linear(features, weight, bias)
    plain = nn.functional.cross_entropy(logits, targets, ignore_index=NO_TARGET, reduction="none")

    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=0)
    ours, theirs = (torch.autograd.grad((weights * nats).sum(), weight)[0] for nats in (chunked, plain))
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_frozen_head_gets_no_gradient_and_costs_none() -> None:
    features, weight, _, targets = made()
    frozen = weight.detach()

    loss = mean_nats(features, frozen, None, targets, rows=4)

    loss.backward()
    assert frozen.grad is None
    assert features.grad is not None


def test_bf16_autocast_gives_what_whole_logits_give_under_it() -> None:
    features, weight, bias, targets = made()
    with torch.autocast("cpu", torch.bfloat16):
        chunked = mean_nats(features, weight, bias, targets, rows=4)
        logits = nn.functional.linear(features, weight, bias).float()
        plain = nn.functional.cross_entropy(logits, targets, ignore_index=NO_TARGET)

    torch.testing.assert_close(chunked, plain, rtol=1e-4, atol=0)
    ours, theirs = (torch.autograd.grad(loss, weight)[0] for loss in (chunked, plain))
    assert ours.dtype == torch.float32
    assert (ours - theirs).norm() <= 0.01 * theirs.norm()  # a bf16 has 8 bits


@pytest.mark.parametrize("name", options("model"))
def test_every_model_has_the_loss_of_its_logits_in_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = create_model(name, vocab_size=VOCABULARY, seed=1).double()
    hidden = torch.randn(2, 5, model.dim, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(VOCABULARY, (2, 5))
    targets[1, 2] = NO_TARGET
    loss = NextTokenLoss(NextTokenConfig(kind="next_token"))
    head = [p for p in model.parameters() if p.dim() == 2 and len(p) == VOCABULARY][-1]

    whole, whole_nats = loss(model, hidden, targets), token_nats(model, hidden, targets)
    monkeypatch.setitem(linear_cross_entropy.MAX_LOGITS_BYTES, "cpu", 3 * 8 * VOCABULARY)
    chunked, nats = loss(model, hidden, targets), token_nats(model, hidden, targets)

    if model.linear_head(hidden) is not None:
        assert "MeanNats" in type(chunked.grad_fn).__name__
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(nats, whole_nats, rtol=1e-12, atol=0)
    for one, other in ((chunked, whole), (nats.sum(), whole_nats.sum())):
        pairs = zip(*(torch.autograd.grad(value, [hidden, head]) for value in (one, other)), strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_no_logits_above_the_limit_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = create_model("pythia", vocab_size=VOCABULARY, seed=1)
    hidden = torch.randn(2, 7, model.dim, requires_grad=True)
    limit = 3 * 4 * VOCABULARY
    monkeypatch.setitem(linear_cross_entropy.MAX_LOGITS_BYTES, "cpu", limit)
    widest = _LargestResult(VOCABULARY, not_rows=model.dim)  # the head, transposed

    with widest:
        NextTokenLoss(NextTokenConfig(kind="next_token"))(model, hidden, torch.zeros(2, 7).long()).backward()

    assert 0 < widest.rows <= 3


def test_limit_gives_at_least_one_row() -> None:
    assert rows_at_once(torch.zeros(1, 4), vocab_size=2**40) == 1


class _LargestResult(torch.utils._python_dispatch.TorchDispatchMode):
    """Most rows of any result [rows, vocab_size] of an operation."""

    def __init__(self, vocab_size: int, *, not_rows: int) -> None:
        super().__init__()
        self.vocab_size, self.not_rows, self.rows = vocab_size, not_rows, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dim() >= 2 and result.shape[-1] == self.vocab_size:
            rows = result.shape[:-1].numel()
            self.rows = max(self.rows, 0 if rows == self.not_rows else rows)
        return result


def test_gradients_of_its_gradients_are_refused_and_not_made_up() -> None:
    features, weight, bias, targets = made()
    loss = mean_nats(features, weight, bias, targets, rows=3)

    with pytest.raises(RuntimeError, match=r"create_graph=True.*Allowed: first gradients"):
        torch.autograd.grad(2 * loss, weight, create_graph=True)
    assert torch.autograd.grad(loss, weight)[0].isfinite().all()


@pytest.mark.parametrize("wrong", [-1, VOCABULARY])
def test_a_target_that_is_no_token_is_refused(wrong: int) -> None:
    features, weight, bias, targets = made()
    targets[1] = wrong

    with pytest.raises(RuntimeError, match="out of bounds"):
        mean_nats(features, weight, bias, targets, rows=3)
