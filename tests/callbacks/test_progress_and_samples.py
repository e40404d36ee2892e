import io
import re
from pathlib import Path

import torch
from tiny_run import TinyModule, fit

from newllm.callbacks.checkpoints import Checkpoints
from newllm.callbacks.progress import Progress
from newllm.callbacks.samples import Samples
from newllm.callbacks.stop import StopAtStep
from newllm.callbacks.tensorboard import TensorBoard


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_writes_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    stream = io.StringIO()

    fit(TinyModule(), [Progress(every_seconds=0, stream=stream)], max_steps=4, enable_checkpointing=False)

    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert re.fullmatch(r"step 1/4  loss \d\.\d{3}  [\d,]+ tokens/s  ETA \d+:\d\d", lines[0])
    assert re.fullmatch(r"step 4/4  loss \d\.\d{3}  val loss \d\.\d{3}  [\d,]+ tokens/s  ETA 0:00", lines[3])


def test_progress_is_quiet_between_its_lines_and_tells_the_last_step(tmp_path: Path) -> None:
    stream = io.StringIO()

    fit(TinyModule(), [Progress(every_seconds=1000, stream=stream)], max_steps=4, enable_checkpointing=False)

    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["4/4"]


def test_progress_keeps_one_line_in_a_terminal(tmp_path: Path) -> None:
    stream = Terminal()
    progress = Progress(every_seconds=1000, stream=stream, terminal_seconds=0)

    fit(TinyModule(), [progress], max_steps=3, enable_checkpointing=False)

    assert stream.getvalue().count("\r") == 3
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().endswith("\x1b[K\n")


def test_samples_are_written_every_n_steps_and_drop_what_a_resumed_run_makes_again(tmp_path: Path) -> None:
    def callbacks() -> list:
        board = TensorBoard(tmp_path / "tensorboard")
        samples = Samples(tmp_path, every_steps=2, sample=lambda: ["one\nstep 9\n", ""], loggers=[board])
        return [samples, Checkpoints(tmp_path / "checkpoints", every_steps=3)]

    fit(TinyModule(), [StopAtStep(3), *callbacks()], max_steps=8)
    with open(tmp_path / "samples.txt", "a") as file:
        file.write("step 4\n    written before the process was killed\n\n")
    fit(TinyModule(), callbacks(), max_steps=6, resume=tmp_path / "checkpoints/last.ckpt")

    section = "    one\n    step 9\n\n    \n\n"
    assert (tmp_path / "samples.txt").read_text() == "".join(f"step {step}\n{section}" for step in (2, 4, 6))


def test_looking_at_samples_changes_nothing_of_the_run(tmp_path: Path) -> None:
    modes: list[bool] = []

    def noisy(module: TinyModule) -> list[str]:
        modes.append(module.net.training or torch.is_grad_enabled())
        torch.rand(3)
        return ["text"]

    def train(*, samples: bool) -> TinyModule:
        module = TinyModule()
        module.net.append(torch.nn.Dropout(0.5))
        module.net[0].eval()
        callback = Samples(tmp_path, every_steps=1, sample=lambda: noisy(module), loggers=[])
        fit(module, [callback] if samples else [], max_steps=4, enable_checkpointing=False)
        return module

    watched, unwatched = train(samples=True), train(samples=False)

    assert modes == [False] * 4
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), unwatched.parameters(), strict=True))
    assert [part.training for part in watched.net] == [part.training for part in unwatched.net] == [False, True, True]
