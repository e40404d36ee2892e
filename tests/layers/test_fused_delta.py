"""The token delta rule by a device's kernel: a stand-in with the package's signature, right and wrong."""

import logging
import re
import types

import pytest
import torch
from small_layers import build, empty, texts

from newllm import hardware
from newllm.config.compose import compose
from newllm.layers import fused_delta
from newllm.layers.kernels import DeltaToken
from newllm.models.create import create_model

SEGMENT = 4


def stand_in(q, k, v, beta, scale=None, initial_state=None, output_final_state=False):
    """What `fla.ops.delta_rule.chunk_delta_rule` computes, token by token in fp32: [B, T, H, d], strengths [B, T, H]."""
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16, "the package takes no fp32"
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    matrix, answers = initial_state.float(), []
    for query, key, value, strength in zip(*(tensor.float().unbind(1) for tensor in (q, k, v, beta)), strict=True):
        fresh = strength[..., None] * (value - torch.einsum("bhk,bhkv->bhv", key, matrix))
        matrix = matrix + torch.einsum("bhk,bhv->bhkv", key, fresh)
        answers.append(scale * torch.einsum("bhk,bhkv->bhv", query, matrix))
    return torch.stack(answers, dim=1).to(q.dtype), matrix if output_final_state else None


class HalfGradient(torch.autograd.Function):
    """Right forward, half the gradient on the way back: the package's known fault looks like this."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return 0.5 * gradient


def wrong_by_keys(q, k, v, beta, **options):
    return stand_in(q, HalfGradient.apply(k), v, beta, **options)


def not_finite(q, k, v, beta, **options):
    answers, matrix = stand_in(q, k, v, beta, **options)
    return answers, matrix * float("nan")


def too_wide(*_, **__):
    raise AssertionError("head size 512 is above 256\nand more")


def checked(rule):
    return fused_delta.problem_with(rule, DeltaToken().as_one_segment, num_heads=2, head_dim=8, device="cpu")


def test_a_kernel_with_our_gradients_is_accepted():
    assert checked(stand_in) is None


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (wrong_by_keys, r"^it differs from this package's own form, by keys [0-9.]+%$"),
        (not_finite, r"differs .*memory nan%"),
        (too_wide, r"^it ends with AssertionError: head size 512 is above 256$"),
        (lambda *given, **options: stand_in(*given, **{**options, "scale": None}), r"differs .*answers "),
    ],
)
def test_a_kernel_that_is_wrong_is_named_with_what_is(rule, message):
    problem = checked(rule)

    assert re.search(message, problem)


@pytest.mark.parametrize("calls", [[14], [3, 9, 2], [4, 8, 2]])
def test_layer_with_the_kernel_has_the_outputs_states_and_gradients_of_its_own(calls):
    own, fused = (build("infini-delta-token", segment_length=SEGMENT) for _ in range(2))
    assert fused.use_fused(stand_in, "cpu") is None
    hidden = texts(2, sum(calls))

    found = []
    for layer in (own, fused):
        given, state, outputs = hidden.clone().requires_grad_(), empty(layer, 2), []
        for part in given.split(calls, dim=1):
            output, state = layer(part, state)
            outputs.append(output)
        total = torch.cat(outputs, dim=1).square().sum() + state.memory.matrix.square().sum()
        gradients = torch.autograd.grad(total, [given, *layer.parameters()], allow_unused=True)
        found.append([torch.cat(outputs, dim=1), state.memory.matrix, state.memory.norm, state.keys, *gradients])

    for one, other in zip(*found, strict=True):
        if one is None:  # the gate of a memory that nothing weighs
            assert other is None
            continue
        assert (one - other).norm() <= 0.02 * one.norm() + 1e-6  # bf16 has 8 bits


def test_the_kernel_is_called_once_for_all_whole_segments_of_a_call_and_never_without_gradient():
    layer, calls = build("infini-delta-token", segment_length=SEGMENT), []
    layer.use_fused(stand_in, "cpu")
    layer.kernel.fused = lambda *given, **options: calls.append(given[0].shape[1]) or stand_in(*given, **options)

    layer(texts(2, 14), empty(layer, 2))
    with torch.no_grad():
        layer(texts(2, 14), empty(layer, 2))
    layer(texts(2, 14), empty(layer, 2), update_memory=False)

    assert calls == [12]


@pytest.mark.parametrize(
    "name", ["infini-delta-token-banks", "multi-delta-token", "hierarchical-delta-token", "infini"]
)
def test_layers_with_several_memories_or_another_kernel_keep_to_their_own(name):
    assert not build(name).takes_fused


GPU = ["runtime=gpu", "runtime.precision=bf16-mixed"]


def chosen(rule, monkeypatch, *overrides):
    """Whether the layer of a run with these overrides trains with the package's kernel."""
    monkeypatch.setattr(fused_delta, "installed", lambda: rule)
    model = create_model("infini", vocab_size=16, dim=16, memory_kernel="delta_token")
    layer_class = type(model.layers[0])
    on_device = layer_class.use_fused
    monkeypatch.setattr(layer_class, "use_fused", lambda self, rule, device: on_device(self, rule, "cpu"))
    hardware.use_fused_kernels(model, compose(list(overrides)).runtime)
    return model.layers[0].kernel.fused is not None


def test_a_run_uses_the_kernel_if_it_is_right_and_says_so(monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        assert chosen(stand_in, monkeypatch, *GPU)

    assert "its gradients agree" in caplog.text


def test_a_run_falls_back_with_a_message_if_it_is_wrong(monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        assert not chosen(wrong_by_keys, monkeypatch, *GPU)

    assert "flash-linear-attention is not used, it differs from this package's own form, by keys" in caplog.text


@pytest.mark.parametrize(
    ("rule", "overrides"),
    [(None, GPU), (stand_in, ["runtime=cpu"]), (stand_in, ["runtime=gpu", "runtime.precision=32-true"])],
)
def test_a_run_without_the_package_or_in_fp32_keeps_to_its_own_form(rule, overrides, monkeypatch):
    assert not chosen(rule, monkeypatch, *overrides)


def test_installed_takes_the_kernel_from_the_package(monkeypatch):
    package = types.SimpleNamespace(chunk_delta_rule=stand_in)
    monkeypatch.setattr(fused_delta.importlib.util, "find_spec", lambda name: object() if name == "fla" else None)
    monkeypatch.setattr(fused_delta.importlib, "import_module", lambda name: {"fla.ops.delta_rule": package}[name])

    assert fused_delta.installed() is stand_in


def test_a_package_that_cannot_be_imported_is_not_used_and_says_why(monkeypatch, caplog):
    def broken(name):
        raise ValueError("key contains names that are not kernel arguments\nand more")

    model, runtime = create_model("infini", vocab_size=16, dim=16, memory_kernel="delta_token"), compose(GPU).runtime
    monkeypatch.setattr(fused_delta.importlib.util, "find_spec", lambda name: object() if name == "fla" else None)
    monkeypatch.setattr(fused_delta.importlib, "import_module", broken)

    with caplog.at_level(logging.WARNING):
        hardware.use_fused_kernels(model, runtime)

    assert model.layers[0].kernel.fused is None
    assert (
        "is not used, it ends with ValueError: key contains names that are not kernel arguments. Training"
        in caplog.text
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_installed_kernel_is_accepted_or_named_as_wrong():
    pytest.importorskip("fla")

    problem = fused_delta.problem_with(
        fused_delta.installed(), DeltaToken().as_one_segment, num_heads=2, head_dim=64, device="cuda"
    )

    assert problem is None or problem.startswith("it ")
