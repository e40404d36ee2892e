"""Every logger shows what metrics.jsonl holds: the same names at the same steps."""

import csv
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_run import TinyModule, fit

from newllm.callbacks.checkpoints import Checkpoints
from newllm.callbacks.csv_table import CsvTable
from newllm.callbacks.logger import Logger
from newllm.callbacks.stop import StopAtStep
from newllm.callbacks.telemetry import Telemetry
from newllm.callbacks.weights_and_biases import WeightsAndBiases
from newllm.config.compose import examine
from newllm.config.extras import not_installed
from newllm.run_record import read_metrics

CONFIG = {"name": "tiny", "seed": 3, "model": {"kind": "pythia"}, "runtime": {"devices": 1}}
NO_WANDB = not_installed("logger.wandb=true", "wandb", "wandb", "logger=none")


def train(folder: Path, loggers: Sequence[Logger], *others: Any, **options: Any) -> None:
    telemetry = Telemetry(folder, log_every_steps=2, loggers=loggers)
    callbacks = [telemetry, *others, Checkpoints(folder / "checkpoints", every_steps=4)]
    fit(TinyModule(), callbacks, **{"max_steps": 12, "validate_every_batches": 3, **options})
    telemetry.record({"val/loss_after": 1.5})


def table(path: Path) -> list[dict[str, float]]:
    with open(path, newline="") as file:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def test_the_table_holds_the_lines_of_a_resumed_run(tmp_path: Path) -> None:
    train(tmp_path, [CsvTable(tmp_path / "metrics.csv")], StopAtStep(5))
    train(tmp_path, [CsvTable(tmp_path / "metrics.csv")], resume=tmp_path / "checkpoints/last.ckpt")

    assert table(tmp_path / "metrics.csv") == read_metrics(tmp_path)


def test_a_torn_row_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,tokens,train/loss,val/loss\n2,20,3.5,\n4,40,3.25,3.0\n6,60,3.")

    written = CsvTable(path)
    written.open(first_step=5)
    written.scalars(6, {"tokens": 60, "train/loss": 3.125})
    written.scalars(6, {"tokens": 60, "lag/contraction": 0.5})

    assert path.read_text() == (
        "step,tokens,train/loss,val/loss,lag/contraction\n2,20,3.5,,\n4,40,3.25,3.0,\n6,60,3.125,,0.5\n"
    )


@pytest.mark.slow
@pytest.mark.skipif(bool(NO_WANDB), reason="the package wandb is not installed")
def test_weights_and_biases_has_the_names_and_steps_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    board = WeightsAndBiases(tmp_path, CONFIG)

    train(tmp_path, [board])
    board.texts("samples", ["a < b"], 12)
    board.summary(CONFIG, {"val/loss": 2.5})
    board.close()

    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    said = _finished(file)
    lines: dict[int, dict[str, float]] = {}
    for entry in said["history"]:
        if "samples._type" not in entry and "samples" not in entry:
            lines.setdefault(int(entry["step"]), {}).update(entry)
    shown = [{name: value for name, value in line.items() if not name.startswith("_")} for line in lines.values()]
    assert shown == read_metrics(tmp_path)
    assert said["config"] == {"seed": 3, "model.kind": "pythia"}
    assert said["summary"]["val/loss"] == 2.5
    assert said["id"] == (tmp_path / "wandb/id.txt").read_text()
    assert said["project"] == "newllm"


def _finished(file: Path) -> dict[str, Any]:
    """What an offline run left; the process of the package that writes it may end after `finish` has returned."""
    for _ in range(300):
        if (said := _written(file))["has_ended"]:
            return said
        time.sleep(0.1)
    raise AssertionError(f"{file} was not finished in 30 s")


def _written(file: Path) -> dict[str, Any]:
    """What an offline run left for `wandb sync`."""
    from wandb.proto import wandb_internal_pb2

    def values(items: Any) -> dict[str, Any]:
        return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}

    found: dict[str, Any] = {"history": [], "config": {}, "summary": {}, "has_ended": False}
    for data in _logged(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found |= {"id": record.run.run_id, "project": record.run.project}
            found["config"] |= {k: v for k, v in values(record.run.config.update).items() if not k.startswith("_")}
        elif kind == "history":
            found["history"].append(values(record.history.item))
        elif kind == "summary":
            found["summary"] |= values(record.summary.update)
        elif kind == "exit":
            found["has_ended"] = True
    return found


def _logged(content: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log: blocks of 32 KiB, each piece after its checksum, length and kind."""
    place, record = 7, b""  # the file's own name and version come first
    while place + 7 <= len(content):  # a last piece that is being written is shorter than it says, and gives nothing
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15
        length, kind = struct.unpack_from("<HB", content, place + 4)
        if place + 7 + length > len(content):
            return
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def test_a_missing_package_is_refused_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "wandb").mkdir()  # as the package leaves it where it ran: no package
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *(place for place in sys.path if "site-packages" not in place)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)

    (problem,) = not_installed("logger.wandb=true", "wandb", "wandb", "logger=none")

    assert problem.endswith('Install the extra: pip install "newllm[wandb]".')
    assert problem.startswith(
        "logger.wandb=true: needs the package wandb, which is not installed. Allowed here: logger="
    )


def test_no_login_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("newllm.config.schema.not_installed", lambda *_: [])
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)

    _, refused = examine(["logger=wandb"], "train")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123\n")
    _, logged_in = examine(["logger=wandb"], "train")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    _, offline = examine(["logger=wandb"], "train")

    assert refused == [
        "logger.wandb=true: there is no login for api.wandb.ai. Allowed: a login, or WANDB_MODE=offline. "
        "Run `wandb login`, or set WANDB_MODE=offline and send the run later with `wandb sync`."
    ]
    assert logged_in == offline == []


@pytest.mark.slow
@pytest.mark.skipif(bool(NO_WANDB), reason="the package wandb is not installed")
def test_a_run_of_the_command_line_leaves_all_three_logs(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "train.py"
    overrides = [
        *("model=pythia", "size.dim=8", "size.num_layers=1", "size.num_heads=2", "size.mlp_dim=16", "data=delay_copy"),
        *("debug=fast", "evaluation=[]", "logger=wandb", "logger.csv=true", "name=tiny"),
    ]

    result = subprocess.run(
        [sys.executable, str(script), *overrides],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "WANDB_MODE": "offline"},
    )

    assert result.returncode == 0, result.stderr
    folder = tmp_path / result.stdout.splitlines()[-1].removeprefix("run: ")
    assert table(folder / "metrics.csv") == read_metrics(folder)
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert list((folder / "tensorboard").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".cache") == ["outputs"]
