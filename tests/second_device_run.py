"""A run on the second device, interrupted and continued, and evaluated there: `python second_device_run.py <folder> <overrides>`."""

import sys
from pathlib import Path
from typing import Any

import second_device
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

second_device.install()  # what is imported from here on sees the device

from newllm import run  # noqa: E402
from newllm.config.compose import compose  # noqa: E402
from newllm.config.schema import RuntimeConfig  # noqa: E402
from newllm.evaluation.suite import run_suite  # noqa: E402
from newllm.load import load_run  # noqa: E402


def main(folder: Path, overrides: list[str]) -> None:
    """Train, stop, go on, and evaluate."""
    flags = run.trainer_flags

    def there(runtime: RuntimeConfig) -> dict[str, Any]:
        strategy = SingleDeviceStrategy(torch.device(second_device.NAME, 0), second_device.SecondDevice())
        return {**flags(runtime), "accelerator": "auto", "strategy": strategy, "deterministic": False}

    run.trainer_flags = there  # type: ignore[assignment]
    for more in (["stop_at_step=5"], [f"resume={folder}"]):
        given = [*overrides, *more]
        before = second_device.computed
        run.run_training(compose(given), folder, given)
        assert second_device.computed > before, "trained elsewhere"
    loaded = load_run(folder)
    run_suite(loaded, loaded.config.evaluation, device=second_device.NAME)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
