"""Files that a user adds to conf/: what is wrong with one is told with its name, and without a traceback."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from newllm.config import kinds, library
from newllm.config.command_line import check_command_line
from newllm.config.compose import compose
from newllm.config.problems import ConfigError

HEADER = b"# @package _global_\n"


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of conf/, found in place of our own."""

    def forget() -> None:
        for cached in (library.chosen_by_default, library.options, library.description):
            cached.cache_clear()

    shutil.copytree(library.conf_folder(), tmp_path / "conf")
    monkeypatch.setattr(library, "PACKAGE", tmp_path / "newllm")
    forget()
    yield tmp_path / "conf"
    forget()


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        compose(list(overrides))
    assert len(refused.value.problems) == 1, refused.value.problems
    return refused.value.problems[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"name: [\n", r"line 3: cannot be read as YAML \(expected the node content"),
        (b"trainer:\n\tmax_steps: 3\n", r"line 3: cannot be read as YAML \(found character '\\t'"),
        (b"name: a\nname: b\n", r"line 3: cannot be read as YAML \(found duplicate key name\)"),
        (b"name: \xe9\n", "line 2: holds a byte that is not UTF-8"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(
    text: bytes, reason: str, conf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (conf / "experiment" / "mine.yaml").write_bytes(HEADER + text)

    assert re.match(rf"conf/experiment/mine\.yaml: {reason}.*Correct the file\.$", refusal("experiment=mine"))
    for arguments in (["experiment=mine"], ["-m", "experiment=mine"]):
        with pytest.raises(SystemExit) as ended:
            check_command_line(arguments, root="train")
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("conf/experiment/mine.yaml: line") == 1


def test_an_option_without_a_kind_is_told_by_its_key(conf: Path) -> None:
    (conf / "loss" / "mine.yaml").write_text("weight: 1\n")

    assert refusal("loss=mine").startswith("loss.kind: is missing. Allowed: deep_supervision,")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"name: mine\n", 'experiment=mine: .* Allowed: "# @package _global_" as its first line'),
        (b"", 'experiment=mine: .* Allowed: "# @package _global_" as its first line'),
        (HEADER + b"trainer: 3\n", "trainer=3: is not a group of keys.*`- override /trainer: <option>`"),
        (HEADER + b"size: nano\n", "size=nano: is not a group of keys.*`- override /size: <option>`"),
        (
            HEADER + b"defaults: [override /model: infni, _self_]\n",
            r"conf/experiment/mine\.yaml: model=infni: .* Closest: infini\.$",
        ),
        (
            HEADER + b"defaults: [override /models: infini, _self_]\n",
            r"conf/experiment/mine\.yaml: override /models: .* Closest: model\.$",
        ),
    ],
)
def test_a_mistake_in_an_experiment_is_told_in_words_of_its_file(text: bytes, message: str, conf: Path) -> None:
    (conf / "experiment" / "mine.yaml").write_bytes(text)

    assert re.match(message, refusal("experiment=mine"))


def test_what_cannot_be_resolved_is_shown_as_it_was_written(conf: Path) -> None:
    (conf / "experiment" / "mine.yaml").write_bytes(b"name: ${nope}\n")

    with pytest.raises(ConfigError, match=r"experiment\.name=\$\{nope\}") as refused:
        compose(["experiment=mine"])

    assert "object at" not in str(refused.value)


def test_the_experiment_and_the_sweep_of_the_page_are_accepted(conf: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text(encoding="utf-8")
    experiment, sweep = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    (conf / "experiment" / "mine.yaml").write_text(experiment, encoding="utf-8")
    (conf / "sweep" / "my_rates.yaml").write_text(sweep, encoding="utf-8")

    check_command_line(["sweep=my_rates"], root="train")

    assert compose(["experiment=mine"]).trainer.max_steps == 500
    assert compose(["experiment=mine", "sweep=my_rates"]).name == "my_rates"


def test_a_loss_is_two_files(conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = conf.parent / "newllm"
    shutil.copytree(kinds.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "data"))
    shutil.copytree(
        kinds.PACKAGE / "data", package / "data", ignore=lambda _, names: [n for n in names if n[-3:] != ".py"]
    )
    text = (package / "losses" / "next_token.py").read_text(encoding="utf-8")
    (package / "losses" / "smooth.py").write_text(text.replace("NextTokenConfig", "SmoothConfig"), encoding="utf-8")
    (conf / "loss" / "smooth.yaml").write_text("kind: smooth\n", encoding="utf-8")
    monkeypatch.setattr(kinds, "PACKAGE", package)
    kinds._namespace.cache_clear()

    assert [compose(["loss=smooth", *more]).loss.kind for more in ([], ["trainer=lct"])] == ["smooth"] * 2
    assert "it reads states and the trainer gives answers. Allowed with this trainer: deep_supervision." in refusal(
        "model=trm", "trainer=trm", "loss=smooth"
    )
    kinds._namespace.cache_clear()


def test_settings_of_a_measurement_count_only_where_it_is_chosen(conf: Path) -> None:
    setting = b"evaluation:\n  recall:\n    num_blocks: 3\n"
    choosing = b"defaults:\n  - override /evaluation: [perplexity, recall]\n"
    (conf / "experiment" / "mine.yaml").write_bytes(HEADER + choosing + setting)
    (conf / "experiment" / "forgetful.yaml").write_bytes(HEADER + setting)

    assert set(compose(["experiment=mine", "data=mqar"]).evaluation) == {"perplexity", "recall"}
    for chosen, left in (("[perplexity]", {"perplexity"}), ("[]", set())):
        assert set(compose(["experiment=mine", f"evaluation={chosen}"]).evaluation) == left
    assert "evaluation.recall.kind: is missing" in refusal("experiment=forgetful")
