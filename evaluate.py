"""Measures a finished run: `python evaluate.py run=<folder> [evaluation=[...]]`, see `python evaluate.py --help`."""

from newllm.early_signal import leave_on_signal

if __name__ == "__main__":
    leave_on_signal()  # before the other imports, which take a second

import sys

import hydra
from omegaconf import DictConfig

from newllm.config.command_line import check_command_line, job_of
from newllm.config.library import conf_folder
from newllm.plain_warnings import show_plainly


@hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="evaluate")
def evaluate(untyped: DictConfig) -> None:
    """Measure one run folder."""
    job = job_of(untyped, root="evaluate")
    from newllm.evaluation.suite import run_evaluation  # torch takes seconds: mistakes are answered without it

    show_plainly()
    run_evaluation(job.config)


def main() -> None:
    """Check the command line, then hand it to Hydra."""
    sys.argv[1:] = check_command_line(sys.argv[1:], root="evaluate")
    evaluate()


if __name__ == "__main__":
    main()
