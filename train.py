"""Trains a language model: `python train.py [group=option] [key=value]`, see `python train.py --help`."""

from newllm.early_signal import leave_on_signal

if __name__ == "__main__":
    leave_on_signal()  # before the other imports, which take a second

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from newllm.config.command_line import check_command_line, job_of, no_empty_folder, sweep_output
from newllm.config.library import conf_folder
from newllm.ending import told_in_words
from newllm.jobs.job import is_job, run_job


@hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="train")
def train(untyped: DictConfig) -> float | None:
    """Run one configuration; a sweeper gets the last validation loss."""
    job = job_of(untyped, root="train")
    with no_empty_folder(job.folder):
        if is_job():
            return run_job(job, Path(__file__).resolve())
        from newllm.run import run_training  # torch and lightning take seconds: mistakes are answered without them

        with told_in_words():
            return run_training(job.config, job.folder, job.overrides)


def main() -> None:
    """Check the command line, then hand it to Hydra."""
    sys.argv[1:] = check_command_line(sys.argv[1:], root="train")
    output = sweep_output(sys.argv[1:], root="train")
    if output is None:
        return train()
    from newllm.jobs.sweep import run_sweep

    return sys.exit(run_sweep(train, output))


if __name__ == "__main__":
    main()
