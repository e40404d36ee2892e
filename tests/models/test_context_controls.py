"""Models that context models are compared with: their sizes, and what they compute."""

from typing import cast

import pytest
import torch
from small_context import context_config, tokens

from newllm.config.compose import compose
from newllm.config.library import conf_folder
from newllm.config.schema import TrainConfig
from newllm.config.typed import real_config
from newllm.models.base import count_parameters
from newllm.models.context import ContextLM
from newllm.models.create import build_model, create_model
from newllm.models.gru import Gru, GruConfig
from newllm.models.token_window import TokenWindow, TokenWindowConfig
from newllm.trainers.build import training_module_class


def token_window_model(num_input_tokens: int, *, vocab_size: int = 13, dim: int = 6, layers: int = 1) -> TokenWindow:
    config = TokenWindowConfig(
        kind="token_window",
        dim=dim,
        num_layers=layers,
        num_input_tokens=num_input_tokens,
        ffn_layers=1,
        ffn_expand=2,
    )
    return TokenWindow(vocab_size, config).eval()


@torch.no_grad()
def test_one_token_computes_what_a_context_model_does_without_its_context() -> None:
    torch.manual_seed(0)
    model = ContextLM(13, context_config(num_layers=1, dim=6, context_dim=4)).eval()
    control = token_window_model(1)
    with torch.no_grad():
        source, target = model.token_block.layers[0], control.layers[0]
        control.embedding.load_state_dict(model.embedding.state_dict())
        target.norm.load_state_dict(source.norm.state_dict())
        linears = [
            [part for part in layer.ffn.modules() if isinstance(part, torch.nn.Linear)] for layer in (source, target)
        ]
        linears[1][0].weight.copy_(linears[0][0].weight[:, 4:])  # the columns of the context are gone
        linears[1][0].bias.copy_(linears[0][0].bias)

    embedded, _ = model.read_tokens(tokens(2, 5), torch.zeros(2, 0, 6))
    nothing = torch.zeros(2, 5, 4)
    wanted = model.token_block(embedded, contexts=[nothing], previous_context=nothing)

    torch.testing.assert_close(control(tokens(2, 5)).hidden, wanted)


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2])
def test_a_window_reaches_k_tokens_and_no_further(layers: int) -> None:
    model = token_window_model(3, layers=layers).double()
    ids = tokens(1, 8)
    changed = ids.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 13

    moved = (model(ids).logits - model(changed).logits).abs().amax(-1)[0]

    assert [bool(value > 0) for value in moved] == [False, False, True, True, True, False, False, False]


@torch.no_grad()
def test_a_gru_is_the_recurrence_by_hand() -> None:
    torch.manual_seed(0)
    model = Gru(13, GruConfig(kind="gru", dim=6, hidden_dim=4, num_layers=1)).double().eval()
    ids = tokens(1, 3)

    embedded, units = model.embedding_norm(model.embedding(ids))[0], torch.zeros(4, dtype=torch.float64)
    wanted = []
    for token in embedded:
        reset, update, candidate = (model.gru.weight_ih_l0 @ token + model.gru.bias_ih_l0).chunk(3)
        past_reset, past_update, past = (model.gru.weight_hh_l0 @ units + model.gru.bias_hh_l0).chunk(3)
        gate = torch.sigmoid(update + past_update)
        proposed = torch.tanh(candidate + torch.sigmoid(reset + past_reset) * past)
        units = (1 - gate) * proposed + gate * units
        wanted.append(model.norm(token + model.output(units)))

    torch.testing.assert_close(model(ids).hidden[0], torch.stack(wanted))


def test_controls_have_the_size_of_what_they_control() -> None:
    counts = {name: count_parameters(create_model(name, vocab_size=512, seed=0))["total"] for name in CONTROLS}

    assert counts["token_window"] == pytest.approx(counts["context"], rel=0.01)
    assert counts["gru"] == pytest.approx(counts["context"], rel=0.01)


CONTROLS = ("context", "gru", "token_window")


def controls(stem: str) -> dict[str, TrainConfig]:
    """The named runs that a sweep compares."""
    names = sorted(file.stem for file in (conf_folder() / "experiment").glob(f"{stem}_*.yaml"))
    return {name: cast(TrainConfig, real_config(compose([f"experiment={name}"]))) for name in names}


@pytest.mark.parametrize("stem", ["controls", "updates"])
def test_what_a_sweep_compares_sees_the_same_text_in_as_many_steps(stem: str) -> None:
    seen = {}
    for name, config in controls(stem).items():
        procedure = training_module_class(config.trainer.kind)
        text = 128 * 300
        step = procedure.positions_per_step(config, text)
        assert step is not None
        assert (
            getattr(config.trainer, "epochs", None) is None
            or config.trainer.epochs * text >= step * config.trainer.max_steps
        )
        shared = (
            config.data,
            config.tokenizer,
            config.optimizer,
            config.schedule,
            config.trainer.early_stopping_patience,
        )
        seen[name] = (step, config.trainer.max_steps, *shared)

    assert len(seen) >= 7
    assert {name for name, found in seen.items() if found != next(iter(seen.values()))} == set()


@pytest.mark.parametrize(("stem", "more_flops"), [("controls", 1.01), ("updates", 1.09)])
def test_what_a_sweep_compares_costs_about_as_much(stem: str, more_flops: float) -> None:
    """But for those without a context, which computes what is never read."""
    flops = {}
    for name, config in controls(stem).items():
        if getattr(config.model, "plan", None) != "none":
            with torch.device("meta"):
                flops[name] = build_model(config, 1024).flops_per_token(config.data.block_length)

    assert max(flops.values()) <= more_flops * min(flops.values())
