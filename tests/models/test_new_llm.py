"""NewLLM: the published count, every update by hand, positions."""

import torch
from small_context import new_llm, tokens

from newllm.layers.context_update import ContextUpdate
from newllm.models.base import count_parameters
from newllm.models.new_llm import NewLlm, NewLlmConfig


def updated(kind):
    """Update of kind `kind`, its context and hidden units, and the change and gates by hand."""
    update = ContextUpdate(4, 3, kind)
    context, hidden = torch.randn(2, 4), torch.randn(2, 3)
    gates = [torch.sigmoid(hidden @ gate.weight.T + gate.bias) for gate in update.gates]
    return update(context, hidden), context, hidden @ update.change.weight.T + update.change.bias, gates


def test_additive_adds():
    new, context, change, _ = updated("additive")

    torch.testing.assert_close(new, context + change)


def test_layernorm_normalises_the_sum():
    new, context, change, _ = updated("layernorm")

    torch.testing.assert_close(new, torch.nn.functional.layer_norm(context + change, (4,)))


def test_gated_forgets_and_admits():
    new, context, change, (forget, admit) = updated("gated")

    torch.testing.assert_close(new, torch.nn.functional.layer_norm(forget * context + admit * change, (4,)))


def test_convex_mixes():
    new, context, change, (gate,) = updated("convex")

    torch.testing.assert_close(new, (1 - gate) * context + gate * change)


def test_ema_keeps_nine_tenths():
    new, context, change, _ = updated("ema")

    torch.testing.assert_close(new, 0.9 * context + 0.1 * change)


def test_dual_keeps_a_short_and_a_long_half():
    new, context, change, _ = updated("dual")

    torch.testing.assert_close(new[:, :2], context[:, :2] + change[:, :2])
    torch.testing.assert_close(new[:, 2:], 0.99 * context[:, 2:] + 0.01 * change[:, 2:])


def test_dual_refuses_a_context_without_halves():
    config = NewLlmConfig(
        kind="new_llm", dim=4, context_dim=5, hidden_dim=4, num_layers=1, num_positions=None, update="dual"
    )

    assert config.check(None) == [
        "model.context_dim=5: has no halves, which model.update=dual needs. Allowed: even numbers. "
        "Set model.context_dim=6 or choose another update."
    ]


def test_parameters_of_the_published_size():
    config = NewLlmConfig(
        kind="new_llm", dim=256, context_dim=256, hidden_dim=512, num_layers=8, num_positions=32, update="additive"
    )
    with torch.device("meta"):
        model = NewLlm(1000, config)

    assert count_parameters(model)["total"] == 3_009_768


def test_rows_that_stand_elsewhere_have_their_own_positions():
    model, first, second = new_llm(), tokens(2, 2), tokens(2, 2)
    state = model(first).state.reset([True, False])

    mixed = model(second, state)

    assert mixed.state.positions == (2, 4)
    torch.testing.assert_close(mixed.logits[:1], model(second[:1]).logits)
    torch.testing.assert_close(mixed.logits[1:], model(torch.cat([first, second], 1)[1:]).logits[:, 2:])


def test_positions_past_the_last_are_the_last():
    model = new_llm(num_positions=2)
    state = model(tokens(1, 3)).state
    later = state.__class__(state.context, state.window, (40,), state.predicting_dim)

    assert torch.equal(model(tokens(1, 1), later).logits, model(tokens(1, 1), state).logits)
