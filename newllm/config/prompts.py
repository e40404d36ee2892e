"""Prompts of the command line or a file, and where texts go: read before any model is, so that mistakes are answered at once."""

from pathlib import Path

WHERE = "evaluation.generation"


def read_prompts(path: str) -> list[str]:
    """Return the lines of a file.

    Raises:
        ValueError: the file cannot be read, is not UTF-8, or has a line without text.
    """
    where = f"{WHERE}.prompts_file={path}"
    try:
        content = Path(path).read_bytes()
        text = content.decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise ValueError(f"{where}: cannot be read ({error.strerror}). Allowed: a text file. Check the path.") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: is not UTF-8 at byte {error.start} (0x{content[error.start]:02x}). Allowed: UTF-8. "
            "Convert the file, for example with iconv -t UTF-8."
        ) from None
    prompts = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise ValueError(f"{where}: line {number} is empty. Allowed: a prompt on every line. Take the line out.")
    return prompts


def prompt_problems(prompt: str, prompts_file: str | None) -> list[str]:
    """Return what is wrong with the prompts that will be continued."""
    if prompts_file is None:
        return [] if prompt else [f"{WHERE}.prompt: is empty. Allowed: at least one token of text. Give a prompt."]
    try:
        read_prompts(prompts_file)
    except ValueError as error:
        return [str(error)]
    return []


def output_problems(output: str | None) -> list[str]:
    """Return what is wrong with the file that texts will be written to."""
    if output is None or Path(output).parent.is_dir():
        return []
    return [
        f"{WHERE}.output={output}: stands in no folder. Allowed: a file in a folder that is there. "
        f"Make the folder {Path(output).parent} or name another."
    ]
