"""Rotary position embedding."""

import torch

from newllm.layers.rotary import rotate


def test_scores_depend_on_distances_only():
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.randn(2, 3, 5, 8, dtype=torch.float64)

    def scores(offset: int) -> torch.Tensor:
        turned = [rotate(part, offset=offset, rotary_dim=4, base=10000.0) for part in (queries, keys)]
        return turned[0] @ turned[1].transpose(-1, -2)

    torch.testing.assert_close(scores(0), scores(1000), atol=1e-10, rtol=0)


def test_tables_first_made_in_inference_mode_serve_training():
    queries = torch.randn(1, 1, 3, 8, requires_grad=True)
    # A base of its own, so that no other test has made the table.
    with torch.inference_mode():
        rotate(torch.randn(1, 1, 3, 8), offset=0, rotary_dim=4, base=12345.0)

    rotate(queries, offset=0, rotary_dim=4, base=12345.0).sum().backward()

    assert queries.grad is not None
