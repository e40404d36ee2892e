import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import FEEDBACK, INFINI, configure, failed, first_batch, make_model, preflight, prepare, verdicts_on
from torch import Tensor, nn

from newllm.guards.preflight import run_preflight
from newllm.guards.verdict import GuardFailure, require_passed, switched_off
from newllm.layers.feedback import Feedback
from newllm.models.base import LanguageModel
from newllm.models.trm import TrmLM
from newllm.state import State

MODELS = {
    "pythia": ("model=pythia",),
    "infini": INFINI,
    "infini-banks": (*INFINI, "layers.num_memory_banks=2", "layers.local=softmax"),
    "additive": FEEDBACK,
    "gated": (*FEEDBACK, "model.feedback=gated"),
    "sequential": ("model=pythia", "trainer=sequential"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_clean_run_passes_every_guard(tmp_path: Path, name: str) -> None:
    verdicts = preflight(tmp_path, *MODELS[name])

    has_feedback = verdicts["sweep_causality"].status != "not applicable"
    assert has_feedback == (name in ("additive", "gated", "sequential"))
    assert {verdict.status for key, verdict in verdicts.items() if key != "sweep_causality"} == {"passed"}
    require_passed(list(verdicts.values()))


def test_a_model_with_few_positions_is_probed_within_them(tmp_path: Path) -> None:
    config = configure(tmp_path, "data.block_length=4")
    data = prepare(config)
    sizes = {"num_layers": 1, "num_heads": 2, "mlp_dim": 8, "latent_steps": 1, "deep_steps": 1, "supervision_steps": 1}
    model = TrmLM(data.vocab_size, 8, max_positions=4, **sizes)

    verdicts = run_preflight(model, first_batch(data), data, data.tokenizer, config.guards, seed=1)

    assert {verdict.status for verdict in verdicts if verdict.name != "sweep_causality"} == {"passed"}


def test_the_model_and_the_random_state_are_left_as_they_were(tmp_path: Path) -> None:
    config = configure(tmp_path, *FEEDBACK)
    data = prepare(config)
    model = make_model(config, data)
    model.layers[0].eval()  # type: ignore[index,operator]
    batch = first_batch(data)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()

    run_preflight(model, batch, data, data.tokenizer, config.guards, seed=1)

    assert torch.equal(random_state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_the_same_seed_gives_the_same_figures(tmp_path: Path) -> None:
    first, second = preflight(tmp_path, *FEEDBACK), preflight(tmp_path, *FEEDBACK)

    assert first["sweep_causality"].figures["positions"] == second["sweep_causality"].figures["positions"]
    assert first["initial_loss"].figures["loss_nats"] == second["initial_loss"].figures["loss_nats"]


def _without_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = nn.functional.scaled_dot_product_attention

    def unmasked(queries: Tensor, keys: Tensor, values: Tensor, **masks: Any) -> Tensor:
        return attend(queries, keys, values)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", unmasked)


def test_attention_without_mask_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_mask(monkeypatch)

    verdicts = preflight(tmp_path, "model=pythia")

    assert "causality" in failed(verdicts)
    with pytest.raises(GuardFailure, match=r"guards\.causality: in a forward pass, tokens after position \d+ change"):
        require_passed(list(verdicts.values()))


def test_attention_without_mask_is_caught_in_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Position by position nothing later is there to be seen: only the sweep, which training makes, shows the fault."""
    _without_mask(monkeypatch)

    verdicts = preflight(tmp_path, "model=pythia", "trainer=lct")

    assert verdicts["causality"].status == "passed"
    assert "sweep_causality" in failed(verdicts)


def test_linear_attention_without_mask_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "tril", lambda tensor, diagonal=0: tensor)

    assert "causality" in failed(preflight(tmp_path, *INFINI))


def _on_layer(model: LanguageModel, change: Callable[[Tensor, Any, Tensor], tuple[Tensor, Any]]) -> None:
    """Put (hidden, next state, input) -> (hidden, next state) behind the first layer."""

    def hook(layer: nn.Module, inputs: tuple, output: tuple) -> tuple:
        return change(*output, inputs[0])

    model.layers[0].register_forward_hook(hook)  # type: ignore[index,union-attr]


def _memory_norm(state: Any) -> Tensor:
    return torch.stack([tensor.norm() for tensor in vars(state.memory).values() if isinstance(tensor, Tensor)]).sum()


def test_a_leak_that_needs_a_filled_memory_is_caught(tmp_path: Path) -> None:
    def plant(model: LanguageModel) -> None:
        _on_layer(
            model,
            lambda hidden, state, inputs: (hidden + _memory_norm(state) * inputs.mean(1, keepdim=True), state),
        )

    assert "causality" in failed(preflight(tmp_path, *INFINI, change=plant))


def test_feedback_from_a_later_state_is_caught_behind_its_zero_projection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = Feedback.forward
    monkeypatch.setattr(Feedback, "forward", lambda self, embedded, h: feed(self, embedded, h.roll(-1, dims=1)))

    verdicts = preflight(tmp_path, *FEEDBACK)

    assert "sweep_causality" in failed(verdicts)


def _shared(state: State) -> State:
    return state._map(lambda tensor, _: tensor.mean(0, keepdim=True).expand_as(tensor))


def test_a_memory_shared_by_the_batch_is_caught(tmp_path: Path) -> None:
    def plant(model: LanguageModel) -> None:
        _on_layer(model, lambda hidden, state, _: (hidden, dataclasses.replace(state, memory=_shared(state.memory))))

    verdicts = preflight(tmp_path, *INFINI, change=plant)

    assert "rows" in failed(verdicts)
    assert "another text in row 1 changes row 0" in verdicts["rows"].message


@pytest.mark.parametrize("of", ["states", "logits"])
def test_a_mean_over_the_batch_is_caught(tmp_path: Path, of: str) -> None:
    def plant(model: LanguageModel) -> None:
        if of == "states":
            _on_layer(model, lambda hidden, state, inputs: (hidden + 0.1 * inputs.mean(0, keepdim=True), state))
            return
        logits = model.logits
        model.logits = lambda hidden: logits(hidden) - logits(hidden).mean(0, keepdim=True)  # type: ignore[method-assign]

    assert "rows" in failed(preflight(tmp_path, "model=pythia", change=plant))


def test_a_buffer_that_survives_is_caught(tmp_path: Path) -> None:
    config = configure(tmp_path, *INFINI)
    data = prepare(config)
    model = make_model(config, data)
    model.register_buffer("seen", torch.zeros(16))

    def remember(hidden: Tensor, state: Any, inputs: Tensor) -> tuple[Tensor, Any]:
        model.seen.add_(inputs.mean((0, 1)))  # type: ignore[operator,union-attr]
        return hidden + model.seen, state  # type: ignore[operator]

    _on_layer(model, remember)

    verdicts = verdicts_on(model, data, config)

    assert "repeatable" in failed(verdicts)
    assert "a call alters seen" in verdicts["repeatable"].message
    assert torch.equal(model.seen, torch.zeros(16))  # type: ignore[arg-type]  # as it was before the guards


def test_a_memory_in_a_plain_attribute_is_caught_even_before_it_is_read(tmp_path: Path) -> None:
    config = configure(tmp_path, "model=pythia")
    data = prepare(config)
    model = make_model(config, data)

    def remember(hidden: Tensor, state: Any, inputs: Tensor) -> tuple[Tensor, Any]:
        model.last_inputs = inputs
        return hidden, state

    _on_layer(model, remember)

    verdicts = verdicts_on(model, data, config)

    assert failed(verdicts) == ["repeatable"]
    assert "last_inputs" in verdicts["repeatable"].message


def test_a_memory_in_a_list_is_caught_by_the_logits_it_changes(tmp_path: Path) -> None:
    seen: list[Tensor] = [torch.zeros(16)]

    def plant(model: LanguageModel) -> None:
        def remember(hidden: Tensor, state: Any, inputs: Tensor) -> tuple[Tensor, Any]:
            seen[0] = seen[0] + inputs.mean((0, 1))
            return hidden + seen[0], state

        _on_layer(model, remember)

    verdicts = preflight(tmp_path, "model=pythia", change=plant)

    assert "repeatable" in failed(verdicts)
    assert "a second identical call gives other logits" in verdicts["repeatable"].message


def test_a_recurrence_switched_off_in_evaluation_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = Feedback.forward
    monkeypatch.setattr(
        Feedback, "forward", lambda self, embedded, h: feed(self, embedded, h) if self.training else embedded
    )

    assert failed(preflight(tmp_path, *FEEDBACK)) == ["trained_is_evaluated"]


def test_a_recurrence_that_steps_differently_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = Feedback.forward
    monkeypatch.setattr(
        Feedback, "forward", lambda self, embedded, h: feed(self, embedded, h if h.shape[1] > 1 else 0 * h)
    )

    assert failed(preflight(tmp_path, *FEEDBACK)) == ["trained_is_evaluated"]


def _sees_the_next_token_far_on(model: LanguageModel) -> None:
    def look_ahead(hidden: Tensor, state: Any, inputs: Tensor) -> tuple[Tensor, Any]:
        is_far = torch.arange(hidden.shape[1]) >= 50
        return hidden + is_far[:, None] * inputs.roll(-1, dims=1), state

    _on_layer(model, look_ahead)


def _remembers_while_training(model: LanguageModel) -> None:
    kept = [torch.zeros(model.dim)]

    def remember(hidden: Tensor, state: Any, _: Tensor) -> tuple[Tensor, Any]:
        found = kept[0]
        if model.training:
            kept[0] = hidden.detach().mean((0, 1))
        return hidden + found, state

    _on_layer(model, remember)


def _differs_with_gradients(model: LanguageModel) -> None:
    _on_layer(model, lambda hidden, state, _: (hidden * (1.1 if hidden.requires_grad else 1.0), state))


def _gives_the_loss_other_scores(model: LanguageModel) -> None:
    logits = model.logits
    model.logits = lambda hidden: 1.1 * logits(hidden)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("pythia", _sees_the_next_token_far_on),
        ("additive", _sees_the_next_token_far_on),
        ("pythia", _remembers_while_training),
        ("pythia", _differs_with_gradients),
        ("pythia", _gives_the_loss_other_scores),
    ],
)
def test_what_only_training_computes_is_caught(
    tmp_path: Path, name: str, plant: Callable[[LanguageModel], None]
) -> None:
    verdicts = preflight(tmp_path, *MODELS[name], "data.block_length=56", change=plant)

    assert failed(verdicts) == ["trained_is_evaluated"]


def test_a_state_dropped_between_calls_is_caught(tmp_path: Path) -> None:
    def plant(model: LanguageModel) -> None:
        _on_layer(model, lambda hidden, state, _: (hidden, state.reset([True, True])))

    verdicts = preflight(tmp_path, "model=pythia", change=plant)

    assert failed(verdicts) == ["trained_is_evaluated"]


def test_dropout_is_no_difference_between_training_and_evaluation(tmp_path: Path) -> None:
    def plant(model: LanguageModel) -> None:
        model.final_norm = nn.Sequential(nn.Dropout(0.5), model.final_norm)  # type: ignore[arg-type,assignment]

    assert failed(preflight(tmp_path, *FEEDBACK, change=plant)) == []


def test_a_first_loss_of_a_model_sure_of_wrong_answers_is_a_warning(tmp_path: Path) -> None:
    def plant(model: LanguageModel) -> None:
        with torch.no_grad():
            model.head.weight.mul_(60)  # type: ignore[operator,union-attr]

    verdicts = preflight(tmp_path, "model=pythia", change=plant)

    assert verdicts["initial_loss"].status == "warning"
    assert "Allowed: 0.8 to 1.3 ln V" in verdicts["initial_loss"].message
    require_passed(list(verdicts.values()))


def test_the_first_loss_is_measured_by_hand(tmp_path: Path) -> None:
    def plant(model: LanguageModel) -> None:
        nn.init.zeros_(model.head.weight)  # type: ignore[arg-type,union-attr]

    figures = preflight(tmp_path, "model=pythia", change=plant)["initial_loss"].figures

    assert figures["loss_nats"] == pytest.approx(figures["log_vocabulary_nats"], rel=1e-6)
    assert figures["log_vocabulary_nats"] == pytest.approx(math.log(257), rel=1e-6)


def test_a_continued_model_owes_no_first_loss(tmp_path: Path) -> None:
    config = configure(tmp_path)
    data = prepare(config)

    found = run_preflight(
        make_model(config, data), first_batch(data), data, data.tokenizer, config.guards, seed=1, is_fresh=False
    )

    assert {verdict.name: verdict.status for verdict in found}["initial_loss"] == "not applicable"


def _tie(model: LanguageModel) -> None:
    model.head.weight = model.embedding.weight  # type: ignore[union-attr]
    model.tied_parameters = (("embedding.weight", "head.weight"),)


def test_tied_weights_pass(tmp_path: Path) -> None:
    assert failed(preflight(tmp_path, change=_tie)) == []


def test_tied_weights_that_came_apart_are_caught(tmp_path: Path) -> None:
    def plant(model: LanguageModel) -> None:
        _tie(model)
        model.head.weight = nn.Parameter(model.embedding.weight.detach().clone())  # type: ignore[union-attr,operator]

    verdicts = preflight(tmp_path, change=plant)

    assert failed(verdicts) == ["tied_weights"]
    assert "embedding.weight and head.weight are declared as tied" in verdicts["tied_weights"].message


def test_layers_shared_by_accident_are_caught(tmp_path: Path) -> None:
    def plant(model: LanguageModel) -> None:
        model.layers[1] = model.layers[0]  # type: ignore[index,operator]

    verdicts = preflight(tmp_path, change=plant)

    assert failed(verdicts) == ["tied_weights"]
    assert "are not declared as tied" in verdicts["tied_weights"].message


def test_logits_that_are_no_numbers_are_caught_and_said_once(tmp_path: Path) -> None:
    def plant(model: LanguageModel) -> None:
        with torch.no_grad():
            model.final_norm.weight[0] = math.nan  # type: ignore[index,union-attr]

    verdicts = preflight(tmp_path, change=plant)

    assert failed(verdicts) == ["finite"]
    assert verdicts["causality"].status == "not applicable"


def test_all_faults_are_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_mask(monkeypatch)

    def plant(model: LanguageModel) -> None:
        model.layers[1] = model.layers[0]  # type: ignore[index,operator]

    verdicts = preflight(tmp_path, "model=pythia", change=plant)

    with pytest.raises(GuardFailure, match=r"(?s)guards\.tied_weights: .*guards\.causality: "):
        require_passed(list(verdicts.values()))


def test_guards_switched_off_are_recorded() -> None:
    assert switched_off("preflight").status == "off"
