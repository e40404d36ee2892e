"""Memory carried from block to block: what is read is one text, what is trained is what is carried."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from short_fit import SHORT
from torch import Tensor

from newllm.config.compose import compose
from newllm.data.lanes import LaneBatches, TextBlocks, lane_groups
from newllm.evaluation.scoring import Score, token_losses
from newllm.evaluation.streaming import StreamReading
from newllm.layers.memory_state import MemoryLayerState
from newllm.models.base import LanguageModel
from newllm.models.create import build_model
from newllm.state import map_parts, parts_of
from newllm.trainers.build import build_training_module
from newllm.trainers.streaming import StreamingModule

VOCABULARY, BLOCK, SEGMENT = 13, 6, 4
TOKEN_BYTES = torch.ones(VOCABULARY, dtype=torch.int64)
TINY = ["size.dim=8", "size.num_layers=4", "size.num_heads=2", "size.mlp_dim=12", f"data.block_length={BLOCK}"]
MEMORY = [f"layers.segment_length={SEGMENT}", "layers.memory_heads=2"]
STACKS = ["infini", "all_infini", "multi_memory", "hierarchical", "mixed"]


def module(*overrides: str, layers: str = "all_infini") -> StreamingModule:
    """A procedure whose model has every parameter random, so that nothing is hidden by a zero."""
    given = [
        *TINY,
        *SHORT,
        "trainer=streaming",
        f"layers={layers}",
        *([] if layers == "pythia" else MEMORY),
        *overrides,
    ]
    config = compose(given)
    torch.manual_seed(1)
    model = build_model(config, VOCABULARY)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    found = build_training_module(model, config, TOKEN_BYTES, num_samples=0, folder=None)  # type: ignore[arg-type]
    assert isinstance(found, StreamingModule)
    return found


def lanes(*starts: tuple[bool, ...], seed: int = 0) -> list[dict[str, Tensor]]:
    """One batch of random tokens for each tuple, which says which rows begin a text."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for rows in starts:
        tokens = torch.randint(VOCABULARY, (len(rows), BLOCK + 1), generator=generator)
        starts_text = torch.zeros(len(rows), BLOCK, dtype=torch.bool)
        starts_text[:, 0] = torch.tensor(rows)
        marks = {"starts_text": starts_text, "is_padding": torch.zeros_like(starts_text)}
        found.append({"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], **marks})
    return found


def gradients(model: LanguageModel, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("feedback", ["none", "additive"])
@pytest.mark.parametrize("layers", STACKS)
def test_blocks_of_a_lane_are_read_as_one_text(layers: str, feedback: str):
    # A context longer than the text: nothing is forgotten, so that the whole text can be compared with.
    training = module(f"model.feedback={feedback}", "trainer.context_tokens=99", layers=layers)
    batches = lanes((True, True), (False, True), (False, False), (False,))
    ids = [batch["input_ids"] for batch in batches]

    states = [training.states(batch) for batch in batches]

    whole = training.model.exact(torch.cat([part[:1] for part in ids], dim=1)).hidden
    second = training.model.exact(torch.cat([ids[1][1:], ids[2][1:]], dim=1)).hidden
    torch.testing.assert_close(torch.cat([part[:1] for part in states], dim=1), whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat([states[1][1:], states[2][1:]], dim=1), second, atol=1e-5, rtol=1e-4)


def test_a_new_epoch_begins_with_all_lanes():
    training = module()
    last, first = lanes((True, True, True), (False,))[1], lanes((True, True, True), seed=3)[0]
    training.states(lanes((True, True, True))[0])
    training.states(last)

    states = training.states(first)

    assert torch.equal(states, training.model.exact(first["input_ids"]).hidden)


@pytest.mark.parametrize(("context", "kept"), [(0, 0), (5, 5), (99, 2 * BLOCK)])
def test_attention_forgets_and_memory_does_not(context: int, kept: int):
    training = module(f"trainer.context_tokens={context}", layers="infini")

    for batch in lanes((True,), (False,)):
        training.states(batch)

    attention = training.state.layers[1]
    assert (attention.lengths, attention.keys.shape[2]) == ((kept,), kept)
    assert not bool(training.state.layers[0].memory.is_empty().any())


def test_a_window_keeps_what_it_reaches():
    training = module("layers.window=5", layers="pythia")
    batches = lanes((True,), (False,))

    states = torch.cat([training.states(batch) for batch in batches], dim=1)

    whole = training.model.exact(torch.cat([batch["input_ids"] for batch in batches], dim=1)).hidden
    torch.testing.assert_close(states, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("detach_every", [1, 2])
def test_gradient_passes_as_many_blocks_as_asked(detach_every: int):
    training = module(f"trainer.detach_every={detach_every}", "trainer.accumulate_batches=2")
    model, batches = training.model, lanes((True, True), (False, False), seed=2)
    state, expected = model.initial_state(2), []
    for batch in batches:
        output = model.exact(batch["input_ids"], state)
        expected.append(training.loss(model, output.hidden, batch["labels"]))
        state = output.state if detach_every == 2 else output.state.detach()
    wanted = gradients(model, (expected[0] + expected[1]) / 2)

    seen: list[Tensor] = []
    training.on_before_optimizer_step = lambda _: seen.extend(p.grad.clone() for p in model.parameters())  # type: ignore
    fit_accumulated(training, batches)

    for gradient, want in zip(seen, wanted, strict=True):
        torch.testing.assert_close(gradient, want, atol=1e-6, rtol=1e-4)
    assert not any(part.memory.matrix.requires_grad for part in parts_of(training.state, MemoryLayerState).values())


def fit_accumulated(training: StreamingModule, batches: list[dict[str, Tensor]]) -> None:
    import lightning
    from torch.utils.data import DataLoader

    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(training, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]


def test_an_epoch_that_ends_inside_an_accumulation_leaves_no_graph():
    training = module("trainer.detach_every=2", "trainer.accumulate_batches=2")

    fit_accumulated(training, lanes((True,), (False,), (False,)))

    assert not any(part.memory.matrix.requires_grad for part in parts_of(training.state, MemoryLayerState).values())


def score(model: LanguageModel, outputs: list[Any], batches: list[dict[str, Tensor]]) -> float:
    pairs = zip(outputs, batches, strict=True)
    return torch.cat([token_losses(model, output.hidden, batch["labels"])[0] for output, batch in pairs]).mean().item()


def test_validation_reports_memory_on_off_and_of_another_text():
    training = module()
    model, validation = training.model, lanes((True, True), (False, False), (False, False), seed=5)

    metrics = validate(training, validation)

    on, state = [], model.initial_state(2)
    before = [state]
    for batch in validation:
        on.append(model.exact(batch["input_ids"], state))
        state = on[-1].state
        before.append(state)
    off, state = [], model.initial_state(2)
    for batch in validation:
        off.append(model.exact(batch["input_ids"], state, update_memory=False))
        state = off[-1].state
    assert metrics["val/loss"] == pytest.approx(score(model, on, validation), rel=1e-5)
    assert metrics["val/loss_memory_off"] == pytest.approx(score(model, off, validation), rel=1e-5)
    assert len({round(metrics[name], 4) for name in ("val/loss", "val/loss_memory_off", "val/loss_other_memory")}) == 3


def test_another_texts_memory_is_scored_where_there_was_one():
    """In the first block nobody has written anything: what is read there is memory off under another name."""
    training = module()
    validation = lanes((True, True), (False, False), (False, False), seed=5)

    metrics = validate(training, validation)

    on, before, state = [], [], training.model.initial_state(2)
    for batch in validation:
        before.append(state)
        on.append(training.model.exact(batch["input_ids"], state))
        state = on[-1].state
    other, state = [], training.model.initial_state(2)
    for batch, states in zip(validation, before, strict=True):
        theirs = parts_of(states.select([1, 0]), MemoryLayerState)
        state = map_parts(state, MemoryLayerState, lambda name, part, of=theirs: replace(part, memory=of[name].memory))
        other.append(training.model.exact(batch["input_ids"], state, update_memory=False))
        state = other[-1].state
    assert metrics["val/loss_own_memory"] == pytest.approx(score(training.model, on[1:], validation[1:]), rel=1e-5)
    assert metrics["val/loss_other_memory"] == pytest.approx(score(training.model, other[1:], validation[1:]), rel=1e-5)
    assert metrics["val/other_memory_share"] == pytest.approx(2 / 3)


def test_a_memory_that_holds_nothing_yet_is_no_other_memory():
    """A segment of two blocks: the first write comes with the second one."""
    metrics = validate(
        module(f"layers.segment_length={2 * BLOCK}"), lanes((True, True), (False, False), (False, False))
    )
    never = validate(module(f"layers.segment_length={2 * BLOCK}"), lanes((True, True), (False, False)))

    assert metrics["val/other_memory_share"] == pytest.approx(1 / 3)
    assert {"val/loss_memory_off"} == {name for name in never if "memory" in name}


@pytest.mark.parametrize("world_size", [2, 3])
def test_validation_is_the_same_for_any_number_of_processes(world_size: int):
    training = module()
    generator = torch.Generator().manual_seed(9)
    texts = [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in (40, 33, 30, 22, 21, 14, 9)]
    stream = torch.cat([torch.cat([text, torch.zeros(1, dtype=torch.int64)]) for text in texts]).numpy()
    blocks = TextBlocks(stream, block_length=BLOCK, eos_id=0)

    def scores(ranks: int) -> dict[str, Score]:
        total: dict[str, Score] = {}
        for rank in range(ranks):
            batches = LaneBatches(blocks, 5, seed=0, shuffle=False, rank=rank, world_size=ranks, is_held_out=True)
            if rank >= len(lane_groups(5)):
                continue  # reads again what another has read
            reading = StreamReading(training.model, context_tokens=0)
            for picked in batches:
                for name, found in reading.score(blocks.__getitems__(picked), None).items():
                    total[name] = total[name] + found if name in total else found
        return total

    alone, shared = scores(1), scores(world_size)

    assert alone.keys() == shared.keys() == {"exact", "memory_off", "own_memory", "other_memory"}
    for name, found in alone.items():
        assert shared[name].tokens == found.tokens
        assert shared[name].nats == pytest.approx(found.nats, rel=1e-6)


def validate(training: StreamingModule, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    logged: dict[str, float] = {}
    training.log_dict = lambda values: logged.update({name: float(value) for name, value in values.items()})  # type: ignore
    training.on_validation_epoch_start()
    for index, batch in enumerate(batches):
        training.validation_step(batch, index)
    training.on_validation_epoch_end()
    return logged


def test_another_texts_memory_is_that_of_the_lane_beside_it():
    """Two lanes with one text: what the other wrote is what the own is. A segment is a block, so none is written inside one."""
    training = module(f"layers.segment_length={BLOCK}")
    batches = lanes((True, True), (False, False), (False, False), seed=6)
    twins = [{name: tensor[:1].repeat(2, 1) for name, tensor in batch.items()} for batch in batches]

    different, same = validate(training, batches), validate(training, twins)

    assert same["val/loss_other_memory"] == pytest.approx(same["val/loss_own_memory"], rel=1e-6)
    assert different["val/loss_other_memory"] != pytest.approx(different["val/loss_own_memory"], rel=1e-4)


def test_one_lane_has_no_other_text_and_no_memory_nothing_to_turn_off():
    alone = validate(module(), lanes((True,), (False,)))
    without = validate(module("layers.window=4", layers="pythia"), lanes((True, True), (False, False)))

    assert {"val/loss", "val/loss_memory_off"} <= alone.keys()
    assert not {"val/loss_other_memory", "val/loss_own_memory", "val/other_memory_share"} & alone.keys()
    assert not {"val/loss_memory_off", "val/loss_other_memory"} & without.keys()


def test_validation_leaves_the_training_state_alone():
    training = module()
    training.states(lanes((True, True))[0])
    kept = training.state

    validate(training, lanes((True, True, True), (False, False, False), seed=7))

    assert training.state is kept


@pytest.mark.parametrize("feedback", ["none", "additive"])
def test_the_probe_reads_the_memory_that_is_carried(feedback: str):
    training = module(f"layers.segment_length={BLOCK}", f"model.feedback={feedback}", layers="mixed")
    first, second = lanes((True, True), (False, False))

    empty = training.probe(first)
    training.states(first)
    kept = training.state
    carried = training.probe(second)

    # A block is a segment: within the first one nothing has been written yet.
    assert (empty["memory/read_norm"], carried["memory/read_norm"] > 0) == (0.0, True)
    assert {f"memory/{name}_layer_{place}" for name in ("gate_mean", "read_norm") for place in range(3)} <= set(carried)
    assert {"memory/expanded_share", "memory/selection_entropy", "memory/gate_mean"} <= set(carried)
    assert training.state is kept


def test_a_frozen_bank_stays_for_every_text_and_the_only_one_is_refused():
    training = module("layers.num_memory_banks=2", "layers.segments_per_bank=1", layers="infini")
    read = training.model.exact(lanes((True, True), seed=8)[0]["input_ids"]).state
    frozen = read.layers[0].freeze([0])
    training.start_from(type(read)((frozen, *read.layers[1:]), read.hidden, read.positions))

    training.states(lanes((True, True))[0])

    memory = training.state.layers[0].memory
    assert torch.equal(memory.matrix[:, 0], frozen.memory.matrix[:, 0])
    assert bool((memory.matrix[:, 1] != frozen.memory.matrix[:, 1]).any())
    only = module(layers="infini")
    state = only.model.initial_state(2)
    state = type(state)((state.layers[0].freeze(), *state.layers[1:]), state.hidden, state.positions)
    with pytest.raises(ValueError, match=r"layers.0: the only bank is frozen, so streaming would write nothing"):
        only.start_from(state)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.detach_every=2"], r"trainer.detach_every=2: does not divide trainer.accumulate_batches=1"),
        (["data=delay_copy"], r"data=delay_copy: gives samples of their own, no texts to read on in"),
        (["evaluation=[sliding_window]"], r"evaluation=\[sliding_window\]: reads each window from an empty state"),
        (["trainer.context_tokens=-1"], r"trainer.context_tokens=-1: is out of range"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        compose(["trainer=streaming", "model=infini", *overrides])
