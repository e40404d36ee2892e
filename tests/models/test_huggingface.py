"""Our Pythia stack and transformers' GPT-NeoX are one function."""

import re

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from newllm.layers.pythia import PythiaConfig, PythiaLayer
from newllm.models.create import create_model
from newllm.models.huggingface import from_huggingface, load_pretrained, to_huggingface
from newllm.models.transformer import TransformerLM

SIZES = {"vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}


def published(**changes: object) -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**{**SIZES, "rotary_pct": 0.5, **changes}))
    for parameter in model.parameters():  # norms and biases too: their defaults would hide a swap
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def ours(*, feedback: str = "none", window: int | None = None, vocab_size: int = 37) -> TransformerLM:
    config = PythiaConfig(kind="pythia", rotary_share=0.5, rotary_base=10000.0, window=window)
    layers = [PythiaLayer(24, 3, 40, config) for _ in range(2)]
    torch.manual_seed(1)
    model = TransformerLM(vocab_size, 24, layers, feedback=feedback)
    for name, parameter in model.named_parameters():
        if "feedback" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(0, 37, (2, 9), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_imported_model_gives_the_published_logits(input_ids):
    other = published()

    logits = from_huggingface(other)(input_ids).logits

    torch.testing.assert_close(logits, other(input_ids).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_exported_model_gives_our_logits(input_ids):
    model = ours()

    exported = to_huggingface(model).eval()

    torch.testing.assert_close(exported(input_ids).logits, model(input_ids).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_exported_model_keeps_rotary_share_and_base(input_ids):
    config = PythiaConfig(kind="pythia", rotary_share=0.25, rotary_base=500.0, window=None)
    model = TransformerLM(37, 24, [PythiaLayer(24, 3, 40, config)])

    logits = to_huggingface(model).eval()(input_ids).logits

    torch.testing.assert_close(logits, model(input_ids).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_folder_that_transformers_saved_is_read(tmp_path, input_ids):
    other = published()
    other.save_pretrained(tmp_path)

    logits = from_huggingface(tmp_path)(input_ids).logits

    torch.testing.assert_close(logits, other(input_ids).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_feedback_model_starts_as_the_pretrained_one(tmp_path, input_ids):
    other = published()
    other.save_pretrained(tmp_path)
    model = ours(feedback="additive")

    load_pretrained(model, str(tmp_path))

    torch.testing.assert_close(model(input_ids).logits, other(input_ids).logits, atol=1e-4, rtol=0)


def test_pretrained_of_another_size_is_refused_and_changes_nothing(tmp_path):
    published().save_pretrained(tmp_path)
    model = ours(vocab_size=38)
    before = model.embedding.weight.clone()

    with pytest.raises(ValueError, match=r"model\.pretrained=.*vocab_size 38 here and 37 there"):
        load_pretrained(model, str(tmp_path))

    assert torch.equal(model.embedding.weight, before)


def test_pretrained_with_another_rotary_base_is_refused(tmp_path):
    published(rotary_emb_base=500).save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"rotary .*10000.* here and .*500.* there"):
        load_pretrained(ours(), str(tmp_path))


def test_unreachable_hub_is_told_at_once(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(
        ValueError, match=r"model\.pretrained: config\.json of owner/none .*HF_HUB_OFFLINE.*a folder with"
    ):
        load_pretrained(ours(), "owner/none")


def test_damaged_weights_are_refused(tmp_path):
    published().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    with pytest.raises(ValueError, match=r"is damaged"):
        from_huggingface(str(tmp_path))


def test_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        from_huggingface(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"use_parallel_residual": False}, "use_parallel_residual=False"),
        ({"hidden_act": "gelu_new"}, "hidden_act=gelu_new"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps=1e-06"),
    ],
)
def test_other_architectures_are_refused(change, told):
    with pytest.raises(ValueError, match=told):
        from_huggingface(published(**change))


@pytest.mark.parametrize(("keys", "told"), [({"feedback": "additive"}, "feedback"), ({"window": 4}, "window=4")])
def test_parts_that_gpt_neox_has_not_are_not_exported(keys, told):
    with pytest.raises(ValueError, match=told):
        to_huggingface(ours(**keys))


@torch.no_grad()
def test_created_model_has_the_pretrained_weights(tmp_path, input_ids):
    other = published()
    other.save_pretrained(tmp_path)
    sizes = {"dim": 24, "num_layers": 2, "num_heads": 3, "mlp_dim": 40, "rotary_share": 0.5}

    model = create_model("pythia", vocab_size=37, **sizes, pretrained=str(tmp_path))

    torch.testing.assert_close(model(input_ids).logits, other(input_ids).logits, atol=1e-4, rtol=0)


def test_memory_layers_have_no_published_weights(tmp_path):
    with pytest.raises(ValueError, match=r"model\.pretrained: the stack holds InfiniLayer"):
        create_model("infini", vocab_size=37, pretrained=str(tmp_path))


@pytest.mark.parametrize("source", ["/nope", "./not/there", "a b"])
def test_a_path_that_is_no_folder_is_refused_by_its_key(source: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\.pretrained={re.escape(source)}: is no folder.*Correct the path\.$"):
        load_pretrained(ours(), source)


@pytest.mark.parametrize(("heads", "windows"), [((3, 4), (None, None)), ((3, 3), (None, 2))])
def test_layers_that_differ_are_refused(heads: tuple[int, int], windows: tuple[int | None, int | None]):
    configs = [PythiaConfig(kind="pythia", rotary_share=0.5, rotary_base=10000.0, window=window) for window in windows]
    layers = [PythiaLayer(24, number, 40, config) for number, config in zip(heads, configs, strict=True)]

    with pytest.raises(ValueError, match=r"differs from layer to layer \(.*\), GPT-NeoX has one for all"):
        to_huggingface(TransformerLM(37, 24, layers))
