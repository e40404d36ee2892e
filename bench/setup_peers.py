"""`make bench-setup`: install the peers into bench/.venv-peers, one after another; imports the standard library only.

What could not be installed is written down with the reason, and stands as such beside the results.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE / ".venv-peers"
PYTHON = FOLDER / "bin" / "python"
REPORT = FOLDER / "peers.json"
# The same torch as ours: a ratio would else compare two versions of it.
PEERS = {
    "transformers": ["transformers[torch]"],
    "litgpt": ["litgpt"],
    "infini-transformer-pytorch": ["infini-transformer-pytorch"],
    "torchdeq": ["torchdeq"],
}
CUDA_PEERS = {"flash-linear-attention": ["flash-linear-attention"]}


def install(packages: list[str]) -> str | None:
    """Install packages beside those that are there; return why it could not be done, None where it could."""
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "-c", str(HERE / "peers.txt"), *packages], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
    return lines[-1] if lines else f"pip ended with {done.returncode}"


def versions() -> dict[str, str]:
    """Return the versions of everything in the peers' environment."""
    command = [str(PYTHON), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {package["name"].lower(): package["version"] for package in json.loads(listed)}


def has_cuda() -> bool:
    """Return whether the peers' torch finds a CUDA device."""
    code = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([str(PYTHON), "-c", code], capture_output=True, check=False).returncode == 0


def main() -> None:
    """Make the environment, try every peer, write what came of it."""
    venv.create(FOLDER, with_pip=True)
    problem = install(["torch", "numpy"])
    if problem is not None:
        print(f"bench-setup: torch could not be installed ({problem}). Allowed: a package index that has it.")
        sys.exit(1)
    wanted = PEERS | (CUDA_PEERS if has_cuda() else {})
    problems = {name: install(packages) for name, packages in wanted.items()}
    problems |= {name: "needs a CUDA device" for name in CUDA_PEERS if name not in wanted}
    found = versions()
    report = {name: {"version": found.get(name), "problem": problem} for name, problem in problems.items()}
    REPORT.write_text(json.dumps({"torch": found["torch"], "peers": report}, indent=2) + "\n")
    for name, told in report.items():
        print(f"{name:<30} {told['version'] if told['problem'] is None else 'not installed: ' + told['problem']}")


if __name__ == "__main__":
    main()
