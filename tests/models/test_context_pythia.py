"""ContextPythia: half the keys and values, and what its configuration refuses."""

import torch
from small_context import PYTHIA, context_pythia, tokens

import newllm
from newllm.models.context_pythia import ContextPythiaConfig


def kept_bytes(state):
    """Bytes of keys and values, counted on the tensors."""
    return sum(tensor.nbytes for layer in state.layers for tensor in (layer.keys, layer.values))


def test_layers_as_wide_as_the_context_keep_half_the_keys_and_values():
    input_ids = torch.randint(50, (1, 9))
    pythia = newllm.create_model("pythia", vocab_size=50)(input_ids).state
    narrow = newllm.create_model("context_pythia", vocab_size=50)(input_ids).state
    wide = newllm.create_model("context_pythia", vocab_size=50, width="model")(input_ids).state

    assert kept_bytes(narrow) * 2 == kept_bytes(pythia) == kept_bytes(wide) > 0


def test_layers_read_contexts_only():
    model, input_ids = context_pythia(), tokens(2, 5)
    previous = torch.randn(2, 5, model.dim)
    hidden = model(input_ids, previous_hidden=previous).hidden
    context = hidden[..., : model.context_dim]

    expected = model.projection(context)
    for layer in model.layers:
        expected, _ = layer(expected, layer.initial_state(2, device=expected.device, dtype=expected.dtype))

    torch.testing.assert_close(hidden[..., model.context_dim :], expected)


def test_heads_that_do_not_divide_the_context_are_refused():
    config = ContextPythiaConfig(kind="context_pythia", **PYTHIA | {"context_dim": None, "num_heads": 4})

    assert config.check(None) == [
        "model.num_heads=4: does not divide the layers' width 6 (model.width=context). Allowed: 1, 2, 3, 6. "
        "Set model.num_heads to one of these or change model.context_dim."
    ]
