"""Every way to get a configuration wrong is answered with the key, the value, what is allowed and the closest match."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from newllm.config.compose import ConfigError, compose, compose_model, examine
from newllm.config.library import chosen_by_default, load, options
from newllm.config.typed import flat

LEAVES = sorted(flat(dict(load("train", []))))
MISTAKES = [
    (["model=infni"], r"^model=infni: infni is not an option of model\. Allowed: .*infini, .*Closest: infini\.$"),
    (["trainr=lct"], r"^trainr=lct: is neither a group nor a key\. Allowed: .*trainer\. Closest: trainer\.$"),
    (["modeel.dim=3"], r"^modeel\.dim=3: is neither a group nor a key\. Allowed: .* Closest: model\.dim\.$"),
    (["max_steps=3"], r"Closest: trainer\.max_steps\.$"),
    (["+unknown=1"], r"^\+unknown=1: is neither a group nor a key\. Allowed: .*, trainer\.$"),
    (["+model.dimm=3"], r"^\+model\.dimm=3: is not a key of model\. Allowed: .*dim, .* Closest: model\.dim\.$"),
    (["+seed=3"], r"^\+seed=3: seed is a key that is there already\. Write seed=3\.$"),
    (["+experiment=first_run"], r"^\+experiment=first_run: .* Write experiment=first_run\.$"),
    (["~model.dim"], r"^~model\.dim: a key cannot be removed\. Allowed: a value\."),
    (["~trainer"], r"^~trainer: a group can be neither removed nor placed elsewhere\. Allowed: trainer=<one of .*lct"),
    (["model@second=pythia"], r"^model@second=pythia: a group can be neither removed nor placed elsewhere\."),
    (["trainer=null"], r"^trainer=null: null is not an option of trainer\. Allowed: "),
    (["trainer.kind=lct"], r"^trainer\.kind=lct: the kind comes with the option of trainer\. Allowed: trainer=<one of"),
    (["trainer.sweeps=2"], r"^trainer\.sweeps=2: is not a key of trainer\. .*It is a key of trainer=lct: choose that"),
    (["trainer=lct", "trainer.sweps=2"], r"^trainer\.sweps=2: .*Closest: trainer\.sweeps\.$"),
    (["evaluation.lag.batches=1"], r"It is a key of evaluation=\[lag\]: choose that too"),
    (
        ["trainer=lct", "evaluation=[perplexity,lagg]"],
        r"^evaluation=\[perplexity,lagg\]: lagg is not .*Closest: lag\.$",
    ),
    (["size.dim=abc"], r"^size\.dim=abc: is not an integer\. Allowed: an integer at least 1\.$"),
    (["trainer.max_steps=1e4"], r"^trainer\.max_steps=1e4: is not an integer \(write 10000\)\."),
    (["data.shuffle=yes"], r"^data\.shuffle=yes: is not true or false\. Allowed: true, false\.$"),
    (["optimizer.lr=-1"], r"^optimizer\.lr=-1: is out of range\. Allowed: a number above 0\.$"),
    (["optimizer.beta1=1.0"], r"^optimizer\.beta1=1\.0: is out of range\. Allowed: a number at least 0, below 1\.$"),
    (["seed=null"], r"^seed=null: is not an integer\. Allowed: an integer at least 0"),
    (["trainer=lct", "trainer.cache=rom"], r"^trainer\.cache=rom: .*Allowed: disk, none, ram\. Closest: ram\.$"),
    (["model.feedback=aditive"], r"^model\.feedback=aditive: .*Allowed: additive, gated, none\. Closest: additive\.$"),
    (
        ["model.dim=${sizes.dim}"],
        r"^model\.dim=\$\{sizes\.dim\}: cannot be resolved \(Interpolation key 'sizes\.dim' not",
    ),
    (["x=[1"], r"^x=\[1: cannot be read as an override .*Allowed: key=value, group=option, key=\[a,b\]\."),
    (["seed"], r"^seed: cannot be read as an override"),
    (["seed=1,2"], r"^seed=1,2: is several values for one run\. Allowed: one value\. Add -m"),
    (["output_dir="], r"^output_dir='': names no folder\."),
    (["runtime.num_threads=100000"], r"^runtime\.num_threads=100000: is out of range\. .* at most 1024, or null\.$"),
    (["trainer=lct", "trainer.sweeps=1000000"], r"^trainer\.sweeps=1000000: .* at most 65536, or auto\.$"),
    (["model=infini", "layers.ridge_penalty=1e-300"], r"is out of range\. Allowed: a number at least 1e-06\.$"),
    (["data.num_workers=100000"], r"^data\.num_workers=100000: is out of range\. .* at most 1024\.$"),
    (["tokenizer.vocab_size=1000000000000"], r"is out of range\. .* at most 4194304, or null\.$"),
    (["model.num_layers=1000000000000"], r"is out of range\. .* at most 1000\.$"),
    (
        ["layers.stack=[{pythia: 1000000000000}]"],
        r"^layers\.stack=.*: is 1000000000000 layers high\. Allowed: at most 1000\.",
    ),
    (["model.dim=9007199254740991"], r"does not divide model\.dim=9007199254740991\. Allowed: 1\. "),
    (["trainer.max_steps=9223372036854775808"], r"is not an integer up to 9007199254740992\. Allowed: an integer"),
    (["name=a/b"], r"^name=a/b: cannot name a folder\."),
    (["layers.stack=[]"], r"^layers\.stack=\[\]: is not a list of layers\. Allowed: a list of .*infini, .*pythia"),
    (
        ["layers.stack=[{pythi: rest}]"],
        r"pythi is not a kind of layer: there is no newllm/layers/pythi\.py .* LayerConfig\. .*Closest: pythia\.$",
    ),
    (["layers.stack=[{pythia: 0}]"], r"pythia cannot be repeated 0 times\. .*Give an integer of at least 1\.$"),
    (["layers.stack=[{pythia: rest},{infini: rest}]"], r"rest stands there 2 times\."),
    (["model=infini", "size.num_layers=1"], r"^layers\.stack=.*: leaves no layer of model\.num_layers=1 to the rest\."),
    (["layers.stack=[pythia]", "size.num_layers=4"], r"^size\.num_layers=4: the stack lists 1 layers .*Allowed: 1, or"),
    (
        ["model=trm", "trainer=trm", "size.num_layers=3"],
        r"^size\.num_layers=3: the depth of model trm .*Allowed: model\.num_layers=",
    ),
    (["layers.segment_length=32"], r"^layers\.segment_length=32: no layer of the stack has it .*of kind .*infini"),
    (
        ["model=infini", "layers.memory_heads=3"],
        r"^layers\.memory_heads=3: does not divide model\.dim=128\. Allowed: 1",
    ),
    (["model.num_heads=3"], r"^model\.num_heads=3: does not divide model\.dim=128\. Allowed: 1, 2, 4"),
    (["trainer=lct", "model.feedback=none"], r"^trainer=lct: trains a recurrence, model\.feedback=none has none\."),
    (
        ["model.feedback=additive"],
        r"^trainer=standard: cannot train a recurrence, model\.feedback=additive is one\. "
        r"Allowed with one: trainer=lct, sequential, streaming\.",
    ),
    (
        ["model=trm", "trainer=lct"],
        r"^trainer=lct: trains a recurrence, a model of kind trm has none\. Allowed without one: trainer=standard, trm\.",
    ),
    (["data=delay_copy", "tokenizer=bpe"], r"^tokenizer: data=delay_copy gives token ids, not text\."),
    (["evaluation=[lag]"], r"^evaluation\.lag: measures a recurrence, the model has none"),
    (["data.validation_share=0.6", "data.test_share=0.4"], r"^data\.validation_share=0\.6: .*Allowed: a sum below 1\."),
    (
        ["schedule.warmup_steps=2000"],
        r"^schedule\.warmup_steps=2000: is more than trainer\.max_steps=1000\. Allowed: 0",
    ),
    (["trainer.max_steps=100"], r"^trainer\.validate_every_steps=200: is more than trainer\.max_steps=100"),
    (["hydra.rum.dir=x"], r"^hydra\.rum\.dir=x: Hydra cannot compose it \(Key 'rum' not in 'HydraConf'"),
    (
        ["hydra/launcher=slrm"],
        r"^hydra/launcher=slrm: Hydra cannot compose it \(.*Could not find 'hydra/launcher/slrm'",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES, ids=[" ".join(texts) for texts, _ in MISTAKES])
def test_a_mistake_is_named_once(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)

    assert len(caught.value.problems) == 1, caught.value.problems
    assert re.search(message, caught.value.problems[0]), caught.value.problems[0]


def test_all_mistakes_are_named_at_once() -> None:
    overrides = ["modl=infini", "trainer=lct", "trainer.sweeps=0", "size.dim=abc", "+unknown=1", "x=[", "seed=1,2"]

    _, problems = examine([*overrides, "model.feedback=none"], "train")

    assert sorted(problem.partition(": ")[0] for problem in problems) == sorted(
        [*overrides[:1], *overrides[2:], "trainer=lct"]
    )


def test_a_copied_value_is_not_blamed_beside_its_source() -> None:
    _, problems = examine(["size.dim=0", "size.num_heads=x"], "train")

    assert [problem.partition(":")[0] for problem in problems] == ["size.dim=0", "size.num_heads=x"]


def test_a_misspelt_option_does_not_blame_keys_of_the_right_one() -> None:
    _, problems = examine(["model=infni", "trainer=lcd", "trainer.sweeps=2", "layers.segment_length=32"], "train")

    assert [problem.partition(":")[0] for problem in problems] == ["model=infni", "trainer=lcd"]


def test_an_option_like_none_does_not_blame_its_keys() -> None:
    _, problems = examine(["trainer=zzzz", "trainer.whatever=2"], "train")

    assert [problem.partition(":")[0] for problem in problems] == ["trainer=zzzz"]


@settings(max_examples=40, deadline=None)
@given(key=st.sampled_from(LEAVES), position=st.integers(0, 40), change=st.sampled_from(["drop", "double", "swap"]))
def test_a_misspelt_key_finds_its_closest_match(key: str, position: int, change: str) -> None:
    group, _, name = key.rpartition(".")
    at = position % len(name)
    other = {"drop": name[:at] + name[at + 1 :], "double": name[:at] + name[at] + name[at:]}
    other["swap"] = name[:at] + name[at : at + 2][::-1] + name[at + 2 :]
    misspelt = f"{group}.{other[change]}" if group else other[change]
    if len(name) < 4 or name[-1].isdigit() or misspelt in LEAVES or other[change] in chosen_by_default("train"):
        return  # too little is left of the word, or it is another one (beta1 and beta2 are alike)

    _, problems = examine([f"{misspelt}=1"], "train")

    assert len(problems) == 1
    assert f"Closest: {key}." in problems[0], problems[0]


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_misspelt_option_finds_its_closest_match(data: st.DataObject) -> None:
    group = data.draw(st.sampled_from([group for group in chosen_by_default("train") if options(group)]))
    option = data.draw(st.sampled_from(options(group)))
    at = data.draw(st.integers(0, len(option) - 1))
    misspelt = option[:at] + option[at] + option[at:]
    if len(option) < 3 or misspelt in options(group):
        return

    _, problems = examine([f"{group}={misspelt}"], "train")

    assert f"Closest: {option}." in problems[0], problems[0]


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("seedmodl.=[]{},:'\"\\$@+~ 0x#/"), max_size=14))
def test_no_text_crashes_the_door(text: str) -> None:
    config, problems = examine([text], "train")

    assert (config is None) == bool(problems)


def test_compose_model_finds_keys_of_the_model_and_of_its_layers() -> None:
    config = compose_model("infini", size="nano", keys={"feedback": "additive", "num_memory_banks": 2})

    assert config.model.feedback == "additive"
    assert config.layers.kinds["infini"].num_memory_banks == 2


@pytest.mark.parametrize("value", ["it's", "a\\b", "a,b", "${x}", ""])
def test_compose_model_hands_texts_over_as_they_are(value: str) -> None:
    if value == "${x}":  # a reference, as in YAML
        with pytest.raises(ConfigError, match="cannot be resolved"):
            compose_model("pythia", size="nano", keys={"pretrained": value})
        return

    assert compose_model("pythia", size="nano", keys={"pretrained": value}).model.pretrained == value


@pytest.mark.parametrize(
    ("name", "size", "keys", "message"),
    [
        ("infni", "nano", {}, r"model=infni: .*Closest: infini"),
        ("infini", "nao", {}, r"size=nao: .*Closest: nano"),
        ("infini", "nano", {"segment_lenth": 3}, r"segment_lenth=3: is not a key\. Allowed: .*Closest: segment_length"),
        ("infini", "nano", {"segment_length": 0}, r"layers\.segment_length=0: is out of range\. Allowed: an integer"),
        ("pythia", "nano", {"segment_length": 3}, r"layers\.segment_length=3: no layer of the stack has it"),
        ("infini", "nano", {"memory_heads": 3}, r"layers\.memory_heads=3: does not divide model\.dim=128"),
    ],
)
def test_compose_model_refuses_what_a_command_line_would(name: str, size: str, keys: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_model(name, size=size, keys=keys)
