"""Command lines of the small commands: what is mistaken on them is refused as train.py refuses it."""

import argparse
from pathlib import Path
from typing import NoReturn

from newllm.config.command_line import refuse


class Parser(argparse.ArgumentParser):
    """A parser that ends with exit code 2 and one block on stderr."""

    def error(self, message: str) -> NoReturn:
        refuse([f"{message}. Allowed: what {self.prog} --help shows. Change the command line."])


def folder(text: str) -> Path:
    """Return an argument as a folder; an empty one is none, it would be the current folder unasked."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name names no folder, . is the current one")
    return Path(text)
