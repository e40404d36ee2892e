"""Every model in one graph: torch.compile finds nothing in its pass that only Python can do."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from newllm.config.library import options
from newllm.models.create import create_model

# PyTorch compiles no nn.GRU: on a GPU it is one kernel of cuDNN already.
NAMES = [name for name in options("model") if name != "gru"]
VOCABULARY, ROWS, LENGTH = 64, 2, 130  # two segments of the memory layers and an open one


def loss_of(model: Any, input_ids: Tensor, labels: Tensor, previous: Tensor) -> Tensor:
    """The loss of one parallel pass. The loss in chunks is not part of it: it is compiled by itself where that pays."""
    given = {"previous_hidden": previous} if model.has_feedback else {}
    return nn.functional.cross_entropy(model(input_ids, **given).logits.flatten(0, 1), labels.flatten())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_model_trains_in_one_graph(name: str) -> None:
    model = create_model(name, vocab_size=VOCABULARY, seed=0).train()
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH + 1))
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.randn(ROWS, LENGTH, model.dim)
    torch.compiler.reset()
    # Both ways are traced, with the decompositions of the default backend; to generate code too would take minutes a model.
    compiled: Any = torch.compile(loss_of, fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")

    gradients = []
    for call in (loss_of, compiled):
        model.zero_grad()
        call(model, *batch).backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})

    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        assert (gradients[1][key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, key
