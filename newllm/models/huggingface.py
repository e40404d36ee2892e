"""Pythia stacks to and from transformers' GPTNeoXForCausalLM: the layers are laid out alike, only names differ."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from newllm.layers.pythia import PythiaConfig, PythiaLayer
from newllm.models.base import LanguageModel
from newllm.models.transformer import TransformerLM

HEAD_NAMES = ("lm_head", "embed_out")
"""The head as transformers calls it, from version 5 on and before."""
LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "query_key_value": "attention.query_key_value",
    "output": "attention.dense",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}
PYTHIA: dict[str, Any] = {
    "model_type": "gpt_neox",
    "use_parallel_residual": True,
    "hidden_act": "gelu",
    "attention_bias": True,
    "tie_word_embeddings": False,
    "layer_norm_eps": 1e-5,
}
"""What a transformers configuration must say for its model to be a stack of ours."""
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def to_huggingface(model: TransformerLM) -> Any:
    """Return a GPTNeoXForCausalLM with copies of the weights; its logits are the model's.

    Args:
        model: a stack of Pythia layers without feedback.
    Raises:
        ValueError: the model has parts that GPT-NeoX has not.
    """
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    layers = _pythia_layers(model)
    first = layers[0]
    if model.has_feedback:
        raise ValueError("to_huggingface: the model has feedback, GPT-NeoX has none. Allowed: feedback=none.")
    if first.window is not None:
        raise ValueError(f"to_huggingface: window={first.window} has no place in GPT-NeoX. Allowed: window=null.")
    options: dict[str, Any] = {
        **_sizes(model, layers),
        # The next number up, so that its product with the head's size is not rounded down below the rotated dims.
        "rotary_pct": min(1.0, math.nextafter(first.rotary_dim / first.head_dim, 2.0)),
        "rotary_emb_base": first.rotary_base,
        "bos_token_id": None,  # the tokenizer's business
        "eos_token_id": None,
    }
    config = GPTNeoXConfig(**options, **{key: value for key, value in PYTHIA.items() if key != "model_type"})
    with torch.random.fork_rng(devices=[]):  # the weights that are drawn here are thrown away
        exported: Any = GPTNeoXForCausalLM(config)
    exported.to(model.head.weight.dtype)
    names = _names(len(layers), _head_name(exported.state_dict()))
    weights = {names[name]: tensor for name, tensor in model.state_dict().items()}
    exported.load_state_dict(weights, strict=True)
    return exported.train(model.training)


def from_huggingface(source: Any) -> TransformerLM:
    """Return a model of ours with the weights of a published or given GPT-NeoX model; its logits are that model's.

    Args:
        source: a GPTNeoXForCausalLM, the name of one on the hub, or a folder that holds one.
    Raises:
        ValueError: it is not laid out as Pythia, or the hub does not give it.
    """
    config, weights = _read(source)
    _check_layout(config)
    rotary_share, rotary_base = _rotary(config)
    options = PythiaConfig(kind="pythia", rotary_share=rotary_share, rotary_base=rotary_base, window=None)
    layers = [
        PythiaLayer(config["hidden_size"], config["num_attention_heads"], config["intermediate_size"], options)
        for _ in range(config["num_hidden_layers"])
    ]
    with torch.random.fork_rng(devices=[]):
        model = TransformerLM(config["vocab_size"], config["hidden_size"], layers)
    _copy(model, config, weights)
    return model


def load_pretrained(model: LanguageModel, source: Any, *, key: str = "model.pretrained") -> None:
    """Replace the weights of a Pythia stack by published ones; a feedback projection keeps its own.

    Args:
        model: a stack of Pythia layers; with feedback it starts as the published model, since the projection starts at zero.
        source: as for `from_huggingface`.
        key: what asked for it, for messages.
    Raises:
        ValueError: the model has other layers or sizes, or the hub does not give the checkpoint.
    """
    if not isinstance(model, TransformerLM):
        raise ValueError(f"{key}: {type(model).__name__} has no published weights. Allowed: model=pythia, or null.")
    layers = _pythia_layers(model, key=key)
    config, weights = _read(source, key=key)
    _check_layout(config)
    first = layers[0]
    own = _sizes(model, layers)
    differing: dict[str, Any] = {name: (value, config[name]) for name, value in own.items() if value != config[name]}
    share, base = _rotary(config)
    if (first.rotary_dim, first.rotary_base) != (int(first.head_dim * share) // 2 * 2, base):
        differing["rotary"] = ((first.rotary_dim / first.head_dim, first.rotary_base), (share, base))
    if differing:
        listed = ", ".join(f"{name} {ours} here and {theirs} there" for name, (ours, theirs) in differing.items())
        raise ValueError(
            f"{key}={_title(source)}: has other sizes ({listed}). Allowed: the checkpoint's own. "
            "Set size, tokenizer.vocab_size and layers to match it."
        )
    _copy(model, config, weights)


def _names(num_layers: int, head_name: str) -> dict[str, str]:
    """Our name of every weight to GPT-NeoX's."""
    both = ("weight", "bias")
    found = {"embedding.weight": "gpt_neox.embed_in.weight", "head.weight": f"{head_name}.weight"}
    found |= {f"final_norm.{part}": f"gpt_neox.final_layer_norm.{part}" for part in both}
    for layer in range(num_layers):
        for own, other in LAYER_NAMES.items():
            found |= {f"layers.{layer}.{own}.{part}": f"gpt_neox.layers.{layer}.{other}.{part}" for part in both}
    return found


def _pythia_layers(model: TransformerLM, *, key: str = "to_huggingface") -> list[PythiaLayer]:
    layers = [layer for layer in model.layers if isinstance(layer, PythiaLayer)]
    if len(layers) != len(model.layers):
        others = sorted({type(layer).__name__ for layer in model.layers if not isinstance(layer, PythiaLayer)})
        raise ValueError(
            f"{key}: the stack holds {', '.join(others)}, GPT-NeoX has no such layer. Allowed: Pythia layers only. "
            "Choose layers=pythia."
        )
    for name in ("num_heads", "rotary_dim", "rotary_base", "window"):
        values = {getattr(layer, name) for layer in layers}
        if len(values) > 1:
            told = ", ".join(sorted(map(str, values)))
            raise ValueError(
                f"{key}: {name} differs from layer to layer ({told}), GPT-NeoX has one for all. Allowed: layers alike. "
                "Build the stack with one value."
            )
    return layers


def _sizes(model: TransformerLM, layers: list[PythiaLayer]) -> dict[str, int]:
    """Sizes of a stack, as a transformers configuration calls them."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "num_hidden_layers": len(layers),
        "num_attention_heads": layers[0].num_heads,
        "intermediate_size": layers[0].mlp.up.out_features,
    }


def _head_name(weights: Mapping[str, Tensor]) -> str:
    return next(name for name in HEAD_NAMES if f"{name}.weight" in weights)


@torch.no_grad()
def _copy(model: TransformerLM, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for own, other in _names(config["num_hidden_layers"], _head_name(weights)).items():
        parameters[own].copy_(weights[other])


def _read(source: Any, *, key: str = "from_huggingface") -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Configuration and weights of a model that is given, lies in a folder or is on the hub."""
    if not isinstance(source, str | Path):
        return source.config.to_dict(), source.state_dict()
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config_path, weights_path = (_file(source, name, key) for name in (CONFIG_FILE, WEIGHTS_FILE))
    try:
        return json.loads(config_path.read_text(encoding="utf-8")), load_file(weights_path)
    except (ValueError, SafetensorError) as error:
        raise ValueError(
            f"{key}={source}: is damaged ({error}). Allowed: what transformers saved. Fetch it again."
        ) from error


def _file(source: str | Path, name: str, key: str) -> Path:
    folder = Path(source)
    if folder.is_dir():
        if (folder / name).is_file():
            return folder / name
        raise ValueError(
            f"{key}={source}: holds no {name}. Allowed: a folder that save_pretrained wrote. Save the model there again."
        )
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    from newllm.hub import fetch_file

    try:
        validate_repo_id(str(source))
    except HFValidationError:
        raise ValueError(
            f"{key}={source}: is no folder, and no repository of the hub can be called so. "
            "Allowed: a folder that save_pretrained wrote, owner/name on the hub, null. Correct the path."
        ) from None
    return fetch_file(str(source), name, key=key, choices=f"a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, null")


def _check_layout(config: Mapping[str, Any]) -> None:
    # Published configurations leave out what is at its default.
    found = {name: config.get(name, wanted) for name, wanted in PYTHIA.items()}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found["rope_type"] = rope.get("rope_type", "default")
    for name, wanted in (PYTHIA | {"rope_type": "default"}).items():
        if found[name] != wanted:
            raise ValueError(
                f"{_title(config.get('_name_or_path') or 'the model')}: has {name}={found[name]}. Allowed: {wanted}. "
                "Choose a Pythia model."
            )


def _rotary(config: Mapping[str, Any]) -> tuple[float, float]:
    """Share of each head's dims that is rotated, and the base: where transformers keeps them from version 5 on, or before."""
    rope = config.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
    return float(share), float(rope.get("rope_theta", config.get("rotary_emb_base", 10000)))


def _title(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else type(source).__name__
