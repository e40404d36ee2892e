"""The page on adding a model is run as it stands."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def blocks(page: str) -> dict[str, str]:
    """Code blocks of a page by the file name that stands in backticks before each."""
    found = re.findall(r"`([\w/]+\.(?:py|yaml))`:\n\n```\w+\n(.*?)```", page, flags=re.DOTALL)
    return {name: text + "" for name, text in found}


@pytest.mark.slow
def test_the_model_of_the_page_trains_and_keeps_the_contract(tmp_path: Path):
    for folder in ("newllm", "conf", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    written = blocks((ROOT / "docs" / "add_a_model.md").read_text())
    assert set(written) == {"newllm/models/gru.py", "conf/model/gru.yaml"}
    for name, text in written.items():
        (tmp_path / name).write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run(*command: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
        )

    assert "gru" in run("train.py", "--help").stdout
    trained = run("train.py", "model=gru", "debug=fast", f"data.cache_dir={tmp_path / 'cache'}")
    assert trained.returncode == 0, trained.stderr
    contract = run("-m", "pytest", "tests/models/test_contract.py", "-q", "-k", "gru", "-m", "not gpu")
    assert contract.returncode == 0, contract.stdout
    assert re.search(r"\d+ passed", contract.stdout)


def test_every_python_block_of_the_readme_compiles():
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL):
        compile(block, "README.md", "exec")
