"""Schemas are read out of source that is never run, and are those of the module once it is."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest

from newllm.config import kinds
from newllm.config.schema import LossConfig, TrainerConfig

SOURCE = '''
from __future__ import annotations
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal
import torch_of_another_world
from newllm.config.fields import Count
from newllm.config.schema import LossConfig
if TYPE_CHECKING:
    from newllm.config.schema import TrainConfig

Way = Literal["up", "down"]
WEIGHT = torch_of_another_world.ones(3)

def loss(logits: torch_of_another_world.Tensor): ...

@dataclass(frozen=True, kw_only=True)
class SlopeConfig(LossConfig):
    """A loss."""
    steps: Count
    way: Way
    is_steep: ClassVar[bool] = True

    def check(self, config: TrainConfig) -> list[str]:
        return ["too steep"]

raise RuntimeError("the module was run")
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(kinds, "PACKAGE", tmp_path)
    kinds._namespace.cache_clear()
    (tmp_path / "losses").mkdir()
    yield tmp_path
    kinds._namespace.cache_clear()


def test_schema_is_read_without_running_the_module(package: Path) -> None:
    (package / "losses" / "slope.py").write_text(SOURCE)

    schema = kinds.schema_of(LossConfig, "slope")

    assert schema is not None
    assert schema.__name__ == "SlopeConfig"
    assert list(get_type_hints(schema)) == ["reads", "kind", "steps", "way", "is_steep"]
    assert schema(kind="slope", steps=1, way="up").check(None) == ["too steep"]
    assert kinds.kinds_of(LossConfig) == ["slope"]


def test_schema_may_derive_from_one_beside_other_code(package: Path) -> None:
    (package / "losses" / "slope.py").write_text(SOURCE)
    (package / "losses" / "hill.py").write_text(
        "from dataclasses import dataclass\n"
        "from newllm.losses.slope import SlopeConfig, loss\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class HillConfig(SlopeConfig):\n"
        "    height: float\n"
    )

    schema = kinds.schema_of(LossConfig, "hill")

    assert schema is not None
    assert list(get_type_hints(schema))[-1] == "height"


@pytest.mark.parametrize("name", ["absent", "../losses/slope", "no-identifier", ""])
def test_a_kind_without_file_has_no_schema(package: Path, name: str) -> None:
    (package / "losses" / "slope.py").write_text(SOURCE)

    assert kinds.schema_of(LossConfig, name) is None


def test_a_schema_that_needs_its_module_says_so(package: Path) -> None:
    (package / "losses" / "wrong.py").write_text(
        "import torch\n"
        "from dataclasses import dataclass\n"
        "from newllm.config.schema import LossConfig\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class WrongConfig(LossConfig):\n"
        "    dtype: torch.dtype\n"
    )

    with pytest.raises(TypeError, match=r"wrong\.py: the schema in line 5 uses 'torch'.*Allowed: names from"):
        kinds.schema_of(LossConfig, "wrong")


def test_read_schema_equals_that_of_the_imported_module() -> None:
    program = (
        "from dataclasses import fields; from typing import get_type_hints\n"
        "from newllm.config import kinds\n"
        "read = {(base, kind): kinds.schema_of(base, kind) for base in kinds.FOLDERS for kind in kinds.kinds_of(base)}\n"
        "for (base, kind), schema in read.items():\n"
        "    real = kinds.import_schema(base, kind)\n"
        "    assert schema is not real and kinds.schema_of(base, kind) is real, kind\n"
        "    assert get_type_hints(schema, include_extras=True) == get_type_hints(real, include_extras=True), kind\n"
        "    assert [f.name for f in fields(schema)] == [f.name for f in fields(real)], kind\n"
    )

    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert result.returncode == 0, result.stderr


def test_facts_of_a_kind_are_known_without_its_code() -> None:
    lct, standard = kinds.schema_of(TrainerConfig, "lct"), kinds.schema_of(TrainerConfig, "standard")

    assert lct is not None
    assert standard is not None
    assert (lct.needs_feedback, standard.needs_feedback) == (True, False)
