"""Recursive models small enough for exact comparison, every parameter random so that nothing is hidden by a zero."""

from newllm.models.trm import TrmLM

VOCABULARY, DIM, POSITIONS = 11, 8, 16


def trm(*, stirred: float = 0.3, **changes: int) -> TrmLM:
    """Return a model with random weights; `stirred` moves every parameter away from its start."""
    sizes = {"num_layers": 1, "num_heads": 2, "mlp_dim": 12, "max_positions": POSITIONS}
    sizes |= {"latent_steps": 2, "deep_steps": 2, "supervision_steps": 2}
    model = TrmLM(VOCABULARY, DIM, **{**sizes, **changes})
    for parameter in model.parameters():
        parameter.data.add_(stirred * parameter.new_empty(parameter.shape).normal_())
    return model.eval()
