"""Trains a language model: `python train.py [group=option] [key=value]`, see `python train.py --help`."""

import sys

import hydra
from omegaconf import DictConfig

from newllm.config.command_line import check_command_line, job_of, no_empty_folder
from newllm.config.library import conf_folder


@hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="train")
def train(untyped: DictConfig) -> float | None:
    """Run one configuration; a sweeper gets the last validation loss."""
    job = job_of(untyped, root="train")
    from newllm.run import run_training  # torch and lightning take seconds: mistakes are answered without them

    with no_empty_folder(job.folder):
        return run_training(job.config, job.folder, job.overrides)


def main() -> None:
    """Check the command line, then hand it to Hydra."""
    sys.argv[1:] = check_command_line(sys.argv[1:], root="train")
    train()


if __name__ == "__main__":
    main()
