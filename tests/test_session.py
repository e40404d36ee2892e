"""Reading, asking, freezing, moving and merging memories."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_sessions import KERNELS, closed_sums, memories, model, same_bits, session, tokenizer

from newllm.config.library import options
from newllm.generation import GREEDY, SamplingOptions, generate
from newllm.memory_file import without_caches
from newllm.models.create import create_model
from newllm.reading import PIECE_CHARACTERS, text_pieces
from newllm.session import MemorySession
from newllm.state import tensors_of

TEXT = "In the beginning God created the heaven and the earth."


@pytest.mark.parametrize("stack", ["infini pythia", "pythia infini", "infini infini", "pythia pythia"])
@pytest.mark.parametrize("feedback", ["none", "additive"])
def test_state_does_not_depend_on_the_cutting_of_the_text(stack, feedback):
    whole = session(stack, feedback=feedback)
    whole.read(TEXT)

    for chunk_tokens in (1, 3, 7):
        cut = session(stack, feedback=feedback, chunk_tokens=chunk_tokens)
        cut.read(TEXT[:11])
        cut.read(TEXT[11:])

        expected, found = tensors_of(whole.state), tensors_of(cut.state)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-4, msg=name)


def test_attention_reaches_between_half_and_all_of_the_context():
    reader = session("pythia")
    reaches = []
    for _ in range(30):
        reader.read("a")
        reaches.append(reader.state.layers[0].lengths[0])

    assert max(reaches) == 7  # and the token itself: 8
    assert min(reaches[8:]) == 4


def test_state_stays_as_small_however_much_is_read():
    reader = session()
    sizes = []
    for _ in range(3):
        reader.read("x" * 64)
        sizes.append(reader.state.nbytes)

    assert sizes[0] == sizes[1] == sizes[2]


def test_pieces_of_a_long_text_are_tokenised_as_the_whole():
    words = " ".join(f"word{number}, and\nmore  text" for number in range(3000))

    pieces = list(text_pieces(words))

    assert len(pieces) > 3
    assert "".join(pieces) == words
    assert all(piece[0] == " " and piece[1].isalnum() for piece in pieces[1:])


def test_text_without_spaces_is_cut_too():
    text = "\u521d" * (3 * PIECE_CHARACTERS + 1)

    assert "".join(text_pieces(text)) == text


@pytest.mark.parametrize("text", ["", "a", "abc"])
def test_text_shorter_than_a_segment_is_read(text):
    reader = session()

    reader.read(text)

    assert reader.tokens_read == len(text)


def test_end_of_text_alone_is_read():
    reader = session()

    reader.read_ids([reader.tokenizer.eos_id])

    assert reader.tokens_read == 1


def test_asking_leaves_the_session_as_it_was():
    reader = session()
    reader.read(TEXT)
    before = reader.state

    answer = reader.generate("And", max_new_tokens=5, seed=3)

    assert reader.state is before
    assert reader.generate("And", max_new_tokens=5, seed=3) == answer


@pytest.mark.parametrize("update_memory", [False, True])
def test_an_answer_is_what_the_model_makes_of_all_that_was_read_and_asked(update_memory):
    """Segments that close within a prompt are read like those before it."""
    reader, options = session("infini infini"), SamplingOptions()
    for layer in reader.model.layers:
        layer.memory_gate.data.fill_(8)  # memory tells everything
    reader.read(TEXT)
    prompt = torch.tensor([reader.tokenizer.encode(TEXT)])
    expected = generate(reader.model, prompt, reader.state, max_new_tokens=60, options=options, seed=5).token_ids[0]

    answer = reader.generate(TEXT, max_new_tokens=60, options=options, seed=5, update_memory=update_memory)

    assert answer == reader.tokenizer.decode(expected.tolist())


def test_continuing_reads_prompt_and_continuation(monkeypatch):
    reader, other = session(), session()
    reader.read(TEXT)
    other.read(TEXT)
    new_ids: list[int] = []
    monkeypatch.setattr(reader.tokenizer, "decode", lambda ids: new_ids.extend(ids) or "")

    reader.generate("And", max_new_tokens=5, options=GREEDY, update_memory=True)

    assert len(new_ids) == 5
    other.read_ids([*other.tokenizer.encode("And"), *new_ids])
    assert same_bits(reader.state, other.state)


def test_empty_prompt_is_refused():
    with pytest.raises(ValueError, match=r"prompt: .*at least one token"):
        session().generate("")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("text", ["", "ab", TEXT])
def test_saved_memory_comes_back_bit_by_bit(tmp_path, kernel, text):
    options = {"memory_kernel": kernel, "write": KERNELS[kernel]}
    reader, other = session(**options), session(**options)
    reader.read(text)
    reader.freeze([1])
    reader.save(tmp_path / "memory.safetensors")

    other.load(tmp_path / "memory.safetensors")

    assert same_bits(other.state, without_caches(reader.state))
    assert other.frozen == (1,)
    assert other.tokens_read == reader.tokens_read


@pytest.mark.parametrize("feedback", ["none", "gated"])
def test_reading_on_after_a_move_equals_reading_straight(tmp_path, feedback):
    straight = session("infini infini", feedback=feedback)
    straight.read(TEXT)
    mover, other = session("infini infini", feedback=feedback), session("infini infini", feedback=feedback)
    mover.read(TEXT[:30])
    mover.save(tmp_path / "memory.safetensors")

    other.load(tmp_path / "memory.safetensors")
    other.read(TEXT[30:])

    for name, tensor in tensors_of(straight.state).items():
        torch.testing.assert_close(tensors_of(other.state)[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


def test_frozen_bank_is_kept_while_reading_and_resetting():
    reader = session()
    reader.read(TEXT)
    reader.freeze([0])
    kept = memories(reader)[0].memory.matrix[:, 0].clone()

    reader.read(TEXT)
    reader.reset()

    memory = memories(reader)[0].memory.matrix
    assert torch.equal(memory[:, 0], kept)
    assert not memory[:, 1].any()
    assert (reader.tokens_read, reader.frozen) == (0, (0,))


def test_reset_without_keeping_frozen_empties_everything():
    reader = session()
    reader.read(TEXT)
    reader.freeze()

    reader.reset(keep_frozen=False)

    assert same_bits(reader.state, reader.model.initial_state(1))


def test_unfrozen_bank_is_written_again():
    reader = session()
    reader.freeze()
    reader.read(TEXT)
    assert not memories(reader)[0].memory.matrix.any()

    reader.unfreeze([1])
    reader.read(TEXT)

    assert memories(reader)[0].memory.matrix[:, 1].any()
    assert not memories(reader)[0].memory.matrix[:, 0].any()


def test_exported_bank_goes_into_another_place_and_touches_nothing_else(tmp_path):
    writer, reader = session(), session()
    writer.read(TEXT)
    reader.read("Something else entirely, and rather long.")
    before = memories(reader)[0]
    writer.export([0], tmp_path / "bank.safetensors")

    reader.load(tmp_path / "bank.safetensors", into=[1])

    after = memories(reader)[0]
    assert torch.equal(after.memory.matrix[:, 1], memories(writer)[0].memory.matrix[:, 0])
    assert torch.equal(after.memory.matrix[:, 0], before.memory.matrix[:, 0])
    assert torch.equal(after.keys, before.keys)


def test_loaded_bank_changes_the_answer(tmp_path):
    writer, reader = session(), session()
    writer.read(TEXT * 4)
    writer.export([0, 1], tmp_path / "banks.safetensors")
    with torch.no_grad():
        empty = reader.model(torch.tensor([[5, 6]]), reader.state).logits

        reader.load(tmp_path / "banks.safetensors", into=[1, 0])

        assert not torch.allclose(reader.model(torch.tensor([[5, 6]]), reader.state).logits, empty)


@pytest.mark.parametrize("kernel", ["elu", "centred", "ridge"])
@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(0, len(TEXT)), min_size=2, max_size=3), banks=st.integers(1, 3))
@example(lengths=[8, 12], banks=2)  # whole segments
@example(lengths=[0, 5], banks=2)
@example(lengths=[3, 0], banks=1)
def test_merged_linear_memories_equal_reading_all_texts(kernel, tmp_path_factory, lengths, banks):
    options = {"memory_kernel": kernel, "write": KERNELS[kernel], "num_memory_banks": banks}
    every, readers = session("infini", **options), [session("infini", **options) for _ in lengths]
    for reader, length in zip(readers, lengths, strict=True):
        reader.read(TEXT[len(TEXT) - length :])
        every.read(TEXT[len(TEXT) - length :])
    path = tmp_path_factory.mktemp("memories") / "last.safetensors"
    readers[-1].save(path)

    readers[0].merge([*readers[1:-1], path])

    # Sums in another order: fp32.
    for own, expected in zip(closed_sums(readers[0]), closed_sums(every), strict=True):
        torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-4)


def test_merging_sessions_does_not_change_them():
    first, second = session(), session()
    second.read(TEXT)
    before = second.state

    first.merge([second, second])

    assert second.state is before


@pytest.mark.parametrize("options", [{"write": "delta"}, {"memory_kernel": "delta_token", "write": None}])
def test_merge_of_delta_memories_is_refused(options):
    first, second = session(**options), session(**options)

    with pytest.raises(ValueError, match="delta rule"):
        first.merge([second])


def test_merge_into_a_frozen_bank_is_refused():
    first = session()
    first.freeze([1])

    with pytest.raises(ValueError, match=r"bank 1 is frozen.*unfreeze\(\[1\]\)"):
        first.merge([session()])


def test_merge_with_another_model_is_refused():
    with pytest.raises(ValueError, match=r"model [0-9a-f]{64}, this is model [0-9a-f]{64}"):
        session().merge([session(seed=2)])


@pytest.mark.parametrize("banks", [[2], [-1], [0, 0], []])
def test_banks_that_cannot_be_taken_are_refused(tmp_path, banks):
    reader = session()

    with pytest.raises(ValueError, match=r"Allowed: different ones of 0 to 1"):
        reader.export(banks, tmp_path / "banks.safetensors")
    with pytest.raises(ValueError, match=r"Allowed: different ones of 0 to 1"):
        reader.freeze(banks)


def test_loading_into_a_frozen_bank_is_refused(tmp_path):
    reader = session()
    reader.export([0], tmp_path / "bank.safetensors")
    reader.freeze([1])

    with pytest.raises(ValueError, match="bank 1 is frozen"):
        reader.load(tmp_path / "bank.safetensors", into=[1])


def test_model_without_memory_reads_but_does_not_save(tmp_path):
    reader = session("pythia pythia")
    reader.read(TEXT)

    with pytest.raises(ValueError, match="save: the model has no memory layer"):
        reader.save(tmp_path / "memory.safetensors")


def test_tokenizer_of_a_larger_vocabulary_is_refused():
    small = model()
    small.vocab_size = 100

    with pytest.raises(ValueError, match=r"tokenizer: has 257 ids, the model 100"):
        MemorySession(small, tokenizer())


@pytest.mark.parametrize(("option", "value"), [("context_tokens", 7), ("context_tokens", 0), ("chunk_tokens", 0)])
def test_sizes_that_cannot_be_read_with_are_refused(option, value):
    with pytest.raises(ValueError, match=f"{option}={value}"):
        MemorySession(model(), tokenizer(), **{option: value})


def test_ids_that_the_model_has_not_are_refused_and_change_nothing():
    reader = session()
    before = reader.state

    with pytest.raises(ValueError, match="token_ids: hold 3 to 999"):
        reader.read_ids([3, 999])

    assert reader.state is before


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(0, 23)),
        st.tuples(st.just("freeze"), st.sampled_from([0, 1])),
        st.tuples(st.just("unfreeze"), st.sampled_from([0, 1])),
        st.tuples(st.just("reset"), st.booleans()),
        st.tuples(st.just("move"), st.just(0)),
        st.tuples(st.just("swap"), st.just(0)),
        st.tuples(st.just("merge"), st.integers(0, 9)),
    ),
    max_size=8,
)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=20, deadline=None)
@given(steps=STEPS)
def test_any_sequence_keeps_what_is_frozen_and_stays_finite(kernel, tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("memories")
    options = {"memory_kernel": kernel, "write": KERNELS[kernel]}
    reader, other = session(**options), session(**options)
    other.read(TEXT)
    for verb, value in steps:
        kept = {bank: memories(reader)[0].memory.matrix[:, bank].clone() for bank in reader.frozen}
        before = reader.state
        if verb == "read":
            reader.read(TEXT[:value])
        elif verb in ("freeze", "unfreeze"):
            getattr(reader, verb)([value])
        elif verb == "reset":
            reader.reset(keep_frozen=value)
            kept = kept if value else {}
        elif verb == "move":
            reader.save(folder / "memory.safetensors")
            reader.load(folder / "memory.safetensors")
            assert same_bits(reader.state, without_caches(before))
        elif verb == "swap":
            reader.export([1, 0], folder / "banks.safetensors")
            if reader.frozen:
                refuses(reader, "is frozen", reader.load, folder / "banks.safetensors", into=[0, 1])
            else:
                matrix = memories(reader)[0].memory.matrix
                reader.load(folder / "banks.safetensors", into=[0, 1])
                assert torch.equal(memories(reader)[0].memory.matrix, matrix.flip(1))
        elif reader.frozen or kernel == "delta_token":
            refuses(reader, "is frozen" if reader.frozen else "delta rule", reader.merge, [other] * value)
        else:
            sums = closed_sums(reader)
            reader.merge([other] * value)
            for own, ours, theirs in zip(closed_sums(reader), sums, closed_sums(other), strict=True):
                torch.testing.assert_close(own, ours + value * theirs, atol=1e-3, rtol=1e-4)

        matrix = memories(reader)[0].memory.matrix
        assert matrix.isfinite().all()
        assert all(torch.equal(matrix[:, bank], bits) for bank, bits in kept.items())


def refuses(reader, match, call, *arguments, **options):
    before = reader.state

    with pytest.raises(ValueError, match=match):
        call(*arguments, **options)

    assert reader.state is before


@pytest.mark.parametrize("banks", [[2], [-1], [0, 0], []])
def test_loading_into_banks_that_do_not_exist_changes_nothing(tmp_path, banks):
    reader = session()
    reader.read(TEXT)
    reader.export([0], tmp_path / "bank.safetensors")
    before = reader.state

    with pytest.raises(ValueError, match=r"into: banks .* Allowed: different ones of 0 to 1"):
        reader.load(tmp_path / "bank.safetensors", into=banks)

    assert reader.state is before


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, len(TEXT)), max_size=5), chunk_tokens=st.integers(1, 9))
def test_any_cutting_gives_one_state(cuts, chunk_tokens):
    whole, cut = session("pythia infini"), session("pythia infini", chunk_tokens=chunk_tokens)
    whole.read(TEXT)
    edges = [0, *sorted(cuts), len(TEXT)]
    for start, stop in itertools.pairwise(edges):
        cut.read(TEXT[start:stop])

    for name, tensor in tensors_of(whole.state).items():
        torch.testing.assert_close(tensors_of(cut.state)[name], tensor, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", sorted(set(options("model")) - {"trm"}))
def test_any_model_reads_and_goes_on(name):
    reader = MemorySession(create_model(name, vocab_size=257, seed=0).eval(), tokenizer(), chunk_tokens=5)
    reader.read("In the beginning")

    assert reader.tokens_read == len("In the beginning")
    assert isinstance(reader.generate("God", max_new_tokens=2, options=GREEDY), str)
    assert reader.tokens_read == len("In the beginning")


def test_a_state_that_does_not_count_is_refused(monkeypatch):
    counted = model()
    monkeypatch.setattr(counted, "initial_state", lambda rows: object())

    with pytest.raises(
        ValueError, match=r"model: object does not count what it has read\. Allowed: states with `positions`"
    ):
        MemorySession(counted, tokenizer())


def test_what_a_frozen_session_had_open_is_merged_too():
    open_one, frozen_one = session("infini"), session("infini")
    for reader in (open_one, frozen_one):
        reader.read("abc")
    frozen_one.freeze()
    merged, expected = session("infini"), session("infini")

    merged.merge([frozen_one])
    expected.merge([open_one])

    assert closed_sums(merged)[0].abs().sum() > 0
    assert same_bits(merged.state, expected.state)


def test_a_prompt_is_read_in_chunks_too(monkeypatch):
    reader, lengths = session(chunk_tokens=3), []
    exact = reader.model.exact
    monkeypatch.setattr(reader.model, "exact", lambda ids, state: lengths.append(ids.shape[1]) or exact(ids, state))

    reader.generate("In the beginning", max_new_tokens=1)

    assert max(lengths) == 3
    assert sum(lengths) == len("In the beginning")
