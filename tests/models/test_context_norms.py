"""Norms of contexts beside the training loss."""

import pytest
import torch
from small_context import new_llm

from newllm.models.create import create_model
from newllm.trainers.base import context_norms


def test_norms_are_of_the_context_alone_over_all_positions() -> None:
    model = new_llm()
    states = torch.zeros(2, 1, model.dim)
    states[0, 0, :2] = torch.tensor([3.0, 4.0])  # norm 5
    states[1, 0, 0] = 1.0
    states[:, :, model.context_dim :] = 100.0  # hidden units, no context

    norms = {name: float(value) for name, value in context_norms(model, states).items()}

    assert norms == {
        "context/norm_mean": 3.0,
        "context/norm_std": pytest.approx(8**0.5),
        "context/norm_max": 5.0,
    }


def test_a_model_without_a_context_has_none() -> None:
    assert context_norms(create_model("pythia", vocab_size=7, seed=0), torch.ones(1, 2, 128)) == {}
