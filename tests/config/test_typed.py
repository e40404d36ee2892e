"""Typed configurations, their plain form and the hash that names them."""

import json

import pytest
import yaml

from newllm.config.compose import ConfigError, compose, read_config
from newllm.config.schema import TrainConfig
from newllm.config.typed import DECIDING, RUN_INDEPENDENT, build, config_hash, flat, plain, real_config

MEMORY = ["model=infini", "trainer=lct", "layers.segment_length=32", "layers.window=16"]


def test_a_configuration_survives_its_plain_form() -> None:
    config = compose([*MEMORY, "evaluation=[perplexity,lag]"])

    again, problems = build(yaml.safe_load(yaml.safe_dump(plain(config))), TrainConfig)

    assert problems == []
    assert again == config
    assert json.dumps(plain(config))


def test_an_evaluation_without_a_kind_is_refused() -> None:
    tree = plain(compose([]))
    tree["evaluation"]["perplexity"].pop("kind")

    config, problems = build(tree, TrainConfig)

    assert config is None
    assert [problem.key for problem in problems] == ["evaluation.perplexity.kind"]


def test_layers_are_flat_in_plain_form_and_hold_used_parameters_only() -> None:
    with_memory, without = plain(compose(MEMORY))["layers"], plain(compose([]))["layers"]

    assert with_memory["stack"] == ["infini", "pythia", "pythia", "pythia"]
    assert (with_memory["segment_length"], with_memory["window"]) == (32, 16)
    assert "segment_length" not in without
    assert without["rotary_share"] == 0.25


@pytest.mark.parametrize(
    ("stack", "expanded"),
    [
        ("[{pythia: rest}]", ["pythia"] * 4),
        ("[infini,{pythia: rest},infini]", ["infini", "pythia", "pythia", "infini"]),
        ("[{infini: 2},pythia]", ["infini", "infini", "pythia"]),
    ],
)
def test_stack_is_filled_to_the_depth_or_decides_it(stack: str, expanded: list[str]) -> None:
    config = compose([f"layers.stack={stack}"])

    assert list(config.layers.stack) == expanded
    assert config.model.num_layers == len(expanded)


def test_of_a_depth_given_twice_the_last_counts() -> None:
    assert compose(["model=infini", "model.num_layers=2", "model.num_layers=3"]).model.num_layers == 3


def test_layers_of_one_kind_share_their_parameters_with_others_of_the_same_name() -> None:
    config = compose(MEMORY)

    assert set(config.layers.kinds) == {"infini", "pythia"}
    assert config.layers.kinds["infini"].kind == "infini"


def test_hash_has_eight_hex_digits_and_depends_on_what_is_computed() -> None:
    hashes = {config_hash(compose(overrides)) for overrides in ([], ["seed=1"], ["model=infini"], ["trainer=lct"])}

    assert len(hashes) == 4
    assert all(len(text) == 8 and int(text, 16) >= 0 for text in hashes)


@pytest.mark.parametrize(
    "override",
    [
        "runtime=ddp_cpu",
        "runtime.num_threads=2",
        "logger=none",
        "callbacks=quiet",
        "output_dir=elsewhere",
        "data.num_workers=2",
        "data.cache_dir=/cache",
        "name=other",
        "stop_at_step=3",
        "check=true",
        "optimizer.lr=0.001",
    ],
)
def test_hash_is_that_of_the_same_computation(override: str) -> None:
    assert config_hash(compose([override])) == config_hash(compose([]))


def test_the_precision_decides_what_is_computed() -> None:
    hashes = {config_hash(compose([text])) for text in ("runtime.precision=64-true", "runtime=gpu", "seed=0")}

    assert len(hashes) == 3


def test_run_independent_keys_exist() -> None:
    keys = flat(plain(compose([])))

    assert [name for name in DECIDING if name not in keys] == []
    assert [name for name in RUN_INDEPENDENT if not any(f"{key}.".startswith(f"{name}.") for key in keys)] == []


def test_real_config_has_the_classes_of_imported_modules() -> None:
    config = real_config(compose(MEMORY))
    from newllm.layers.infini import InfiniConfig
    from newllm.models.transformer import TransformerConfig

    assert isinstance(config.model, TransformerConfig)
    assert isinstance(config.layers.kinds["infini"], InfiniConfig)
    assert plain(config) == plain(compose(MEMORY))


def test_a_saved_configuration_is_read_back(tmp_path) -> None:
    config = compose(MEMORY)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain(config)))

    assert read_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"config\.yaml: cannot be read \(.*No such file.*Allowed: the config\.yaml of a run\."),
        ("a: [1", r"config\.yaml: cannot be read"),
        ("- 1", r"^.*config\.yaml: is empty or no run's configuration\. Allowed: the config\.yaml of a run\..*$"),
        ("", r"^.*config\.yaml: is empty or no run's configuration\."),
        ("name: x", r"not written by this version of newllm: seed: is missing"),
        (
            "model: {kind: gone}",
            r"model\.kind=gone: there is no newllm/models/gone\.py with a schema, .*ModelConfig\. Allowed: .*trans",
        ),
    ],
)
def test_a_damaged_configuration_is_refused(tmp_path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)

    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path / "config.yaml")
