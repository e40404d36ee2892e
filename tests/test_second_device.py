"""Runs on a device whose tensors do not mix with the host's: what a GPU would refuse is refused here, without one.

It computes on the host, so the numbers are those of a CPU. Not seen: kernels, streams, what happens for device type cuda only.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_resume import PROCEDURES, TINY, text, train  # noqa: F401  `text` is a fixture

from newllm.run_record import read_metrics

HERE = Path(__file__).parent
EVERY = ["standard", "lct", "streaming_lanes", "cvfp", "selective", "trm"]
BESIDES = {
    # Token by token, and every operation through Python there: one layer of each kind.
    "streaming_lanes": ["evaluation=[perplexity,positions,memory]", "size.num_layers=2"],
    "lct": ["evaluation=[perplexity,positions,sliding_window,lag]"],
}


def on_second_device(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Train in a process that has the device."""
    command = [sys.executable, str(HERE / "second_device_run.py"), str(folder), *overrides]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("procedure", EVERY)
def test_a_run_on_another_device_is_the_run_on_the_host(procedure: str, text: Path, tmp_path: Path) -> None:  # noqa: F811
    chosen = [*PROCEDURES[procedure], *BESIDES.get(procedure, ["evaluation=[perplexity,positions]"])]
    train(tmp_path / "host", text, *chosen)
    given = [*TINY, f"data.path={text}", f"data.cache_dir={tmp_path / 'cache'}", *chosen]

    done = on_second_device(tmp_path / "there", *given)

    assert done.returncode == 0, done.stderr[-3000:]
    here, there = ({line["step"]: line for line in read_metrics(tmp_path / name)} for name in ("host", "there"))
    assert here.keys() == there.keys()
    for step, line in here.items():
        assert line.keys() == there[step].keys()
        for name in {"train/loss", "val/loss", "optim/grad_norm"} & line.keys():
            assert there[step][name] == pytest.approx(line[name], rel=1e-3), (step, name)
    measured = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("host", "there")]
    assert measured[1]["perplexity"]["loss"] == pytest.approx(measured[0]["perplexity"]["loss"], rel=1e-3)


def test_tensors_of_two_devices_are_refused(tmp_path: Path) -> None:
    script = tmp_path / "mixed.py"
    script.write_text(
        "import second_device, torch\nsecond_device.install()\n"
        "there = torch.ones(3, device='second')\nprint((there + 1).sum().item())\nprint(torch.stack([there[0], torch.tensor(1.0)]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(HERE)}

    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)

    assert done.stdout == "6.0\n"
    assert "aten::stack: expected all tensors on one device" in done.stderr
