"""What a person sees: the report and TensorBoard in a real browser."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import PROGRAM, browser
from made_runs import write_comparison, write_run

from newllm.callbacks.tensorboard import TensorBoard
from newllm.report.__main__ import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no browser here: install the package chromium"),
]


def test_the_report_shows_tables_and_pictures_and_asks_nobody(tmp_path: Path) -> None:
    write_comparison(tmp_path / "runs")
    said = {"name": "initial_loss", "status": "warning", "message": "It is 10.9 nats."}
    write_run(tmp_path / "runs/guarded", config={"model": {"kind": "trm"}}, guards=[said])
    (tmp_path / "runs/torn").mkdir()
    (tmp_path / "runs/torn/config.yaml").write_text("seed: 0\n")
    assert main([str(tmp_path / "runs")]) == 0

    with browser(tmp_path) as page:
        page.open((tmp_path / "runs/report.html").as_uri())
        titles = page.value("[...document.querySelectorAll('h2')].map(head => head.textContent)")
        rows = page.value("[...document.querySelectorAll('table')].map(table => table.tBodies[0].rows.length)")
        drawn = page.value("[...document.images].map(image => image.complete && image.naturalWidth > 500)")
        wide = page.value("document.documentElement.scrollWidth <= window.innerWidth")
        page.picture(tmp_path / "report.png")

    assert titles == [
        *("Results", "Costs", "Differences", "Curves", "val/loss and cost", "Settings that differ"),
        *("Findings of the guards", "Runs", "Not readable"),
    ]
    assert rows == [3, 3, 2, 3, 1, 7, 1]
    assert drawn == [True, True]
    assert wide
    assert page.complaints == []
    outside = [address for address in page.requests if not address.startswith(("data:", "file:"))]
    assert outside == []
    assert [address for address in page.requests if address.startswith("file:")] == [
        (tmp_path / "runs/report.html").as_uri()
    ]
    assert (tmp_path / "report.png").stat().st_size > 50_000


def test_a_second_click_on_a_head_sorts_downwards(tmp_path: Path) -> None:
    assert main([str(write_comparison(tmp_path / "runs"))]) == 0
    head = "[...document.querySelectorAll('th')].find(head => head.textContent.startsWith('val/loss'))"
    letters = "[...document.querySelector('table').tBodies[0].rows].map(row => row.cells[0].textContent)"

    with browser(tmp_path) as page:
        page.open((tmp_path / "runs/report.html").as_uri())
        orders = [page.value(f"{head}.click(), {letters}") for _ in range(2)]

    assert orders == [["A", "B"], ["B", "A"]]
    assert page.complaints == []


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port)]
    running = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with socket.socket() as asked:
                if asked.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/"
    finally:
        running.terminate()
        running.wait(30)


# The page is made of shadow trees: text in any of them.
TEXT = """(() => { const told = []; const walk = node => {
  if (node.shadowRoot) walk(node.shadowRoot);
  if (node.nodeType === 3 && !['STYLE', 'SCRIPT'].includes(node.parentNode.nodeName)) told.push(node.textContent.trim());
  node.childNodes.forEach(walk); };
  walk(document.body); return told.filter(text => text).join('\\n'); })()"""


def test_tensorboard_compares_runs_by_their_settings(tmp_path: Path) -> None:
    for seed, loss in ((1, 2.25), (2, 2.125)):
        board = TensorBoard(tmp_path / f"runs/run_{seed}/tensorboard")
        for step in (5, 10):
            board.scalars(step, {"val/loss": loss + 5 / step, "train/loss": loss})
        config = {"name": "tiny", "seed": seed, "model": {"kind": "infini"}, "optimizer": {"lr": 0.001 * seed}}
        board.summary(config, {"val/loss": loss + 0.5, "train/loss": loss})
        board.close()

    with tensorboard(tmp_path / "runs") as address, browser(tmp_path) as page:
        page.open(f"{address}#hparams")
        page.wait_for(f"{TEXT}.includes('run_2')")
        shown = page.value(TEXT)
        page.picture(tmp_path / "hparams.png")
        outside = [asked for asked in page.requests if not asked.startswith((address, "data:", "blob:"))]

    for text in (
        "model.kind",
        "optimizer.lr",
        "seed",
        "val/loss",
        "infini",
        "2.7500",
        "2.6250",
        "0.0010000",
        "0.0020000",
    ):
        assert text in shown, f"{text} is not on the page"
    assert [complaint for complaint in page.complaints if complaint.startswith("error")] == []
    assert outside == []
