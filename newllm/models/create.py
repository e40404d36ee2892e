"""From the names in conf/ to a model."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from newllm.config.compose import compose_model
from newllm.config.schema import TrainConfig
from newllm.models.base import LanguageModel


def build_model(config: TrainConfig, vocab_size: int) -> LanguageModel:
    """Return the model of a configuration, with random weights from torch's generator.

    Args:
        config: the whole configuration.
        vocab_size: tokens.
    """
    return importlib.import_module(f"newllm.models.{config.model.kind}").build(config, vocab_size)


def load_published(model: LanguageModel, config: TrainConfig) -> None:
    """Give a new model the published weights that its configuration names, if it names any.

    Raises:
        ValueError: they do not fit the model or cannot be had.
    """
    source = getattr(config.model, "pretrained", None)
    if source is not None:
        from newllm.models.huggingface import load_pretrained

        load_pretrained(model, source)


def create_model(
    name: str, *, vocab_size: int, size: str = "nano", seed: int | None = None, **keys: Any
) -> LanguageModel:
    """Return a model from the same conf/ files as the command line, as a plain `nn.Module`.

    Args:
        name: an option of conf/model, for instance "pythia" or "infini".
        vocab_size: tokens.
        size: an option of conf/size.
        seed: of the random weights; None draws from torch's generator as it stands.
        **keys: keys of the model or of its layers, for instance feedback="additive" or num_memory_banks=2.
    Raises:
        ValueError: an unknown name, key or value; the message lists what is allowed.
    """
    if type(vocab_size) is not int or vocab_size < 1:
        raise ValueError(
            f"vocab_size={vocab_size}: is no number of tokens. Allowed: integers of at least 1. Give the tokenizer's vocab_size."
        )
    config = compose_model(name, size=size, keys=keys)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model = build_model(config, vocab_size)
    load_published(model, config)
    return model
