"""`python -m newllm.export <run> <folder>`: a Pythia stack for transformers, with its tokenizer; model.pretrained reads it back."""

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from newllm.arguments import Parser, folder
from newllm.config.command_line import refuse
from newllm.run_record import Run, read_run


def export(run_folder: Path, target: Path, *, checkpoint: str) -> None:
    """Write a run's model as transformers saves one: AutoModelForCausalLM and AutoTokenizer read the folder.

    Args:
        run_folder: run of a stack of Pythia layers without feedback.
        target: folder to write; it must not exist.
        checkpoint: "best" or "last".
    Raises:
        ValueError: there is no such run, GPT-NeoX cannot hold its model, or the target exists.
    """
    _check(read_run(run_folder), target)
    from transformers.utils.logging import disable_progress_bar

    from newllm.load import load_run  # torch takes seconds: mistakes are answered without it
    from newllm.models.huggingface import to_huggingface

    disable_progress_bar()  # of writing one file: it runs into our own lines
    run = load_run(run_folder, "last" if checkpoint == "last" else "best")
    exported = to_huggingface(run.model)  # type: ignore[arg-type]  # _check has seen that it is a stack
    exported.config.max_position_embeddings = run.config.data.block_length  # what it was trained on
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if run.tokenizer_file is not None:
            tokenizer = _tokenizer(run.tokenizer_file, run.tokenizer.eos_id, run.config.data.block_length)
            exported.config.eos_token_id = exported.config.bos_token_id = run.tokenizer.eos_id
            exported.generation_config.eos_token_id = exported.generation_config.bos_token_id = run.tokenizer.eos_id
            tokenizer.save_pretrained(partial)
        exported.save_pretrained(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check(run: Run, target: Path) -> None:
    """Refuse what needs no torch to be seen."""
    try:
        model, stack = run.config["model"], run.config["layers"]["stack"]
    except (KeyError, TypeError):
        raise ValueError(
            f"{run.folder / 'config.yaml'}: is empty or no run's configuration. Allowed: the config.yaml of a run. Name another run."
        ) from None
    others = sorted({kind for kind in stack if kind != "pythia"})
    if model["kind"] != "transformer" or others:
        found = f"layers {', '.join(others)}" if others else f"a model of kind {model['kind']}"
        raise ValueError(
            f"{run.folder}: has {found}, GPT-NeoX has not. Allowed: model=pythia, layers=pythia. Train such a run."
        )
    if target.exists():
        raise ValueError(f"{target}: exists. Allowed: a folder that does not exist yet. Name another, or remove it.")


def _tokenizer(file: Path, eos_id: int, block_length: int) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    # As the run reads text: nothing is put around it, and the name of a special token is text.
    backend = Tokenizer.from_file(str(file))
    backend.post_processor = None
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        split_special_tokens=True,
        model_max_length=block_length,
        model_input_names=["input_ids", "attention_mask"],
    )
    end = tokenizer.convert_ids_to_tokens(eos_id)
    tokenizer.add_special_tokens({"eos_token": end, "bos_token": end})
    return tokenizer


def reading_back(run_folder: Path, target: Path) -> list[str]:
    """Return the overrides with which train.py starts from what was exported."""
    config = read_run(run_folder).config
    sizes = [f"model.{key}={config['model'][key]}" for key in ("dim", "num_layers", "num_heads", "mlp_dim")]
    rotary = [f"layers.{key}={config['layers'][key]}" for key in ("rotary_share", "rotary_base")]
    file = target / "tokenizer.json"
    tokenizer = ["tokenizer=file", f"tokenizer.path={file}"] if file.is_file() else []
    return ["model=pythia", f"model.pretrained={target}", *sizes, *rotary, *tokenizer]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit code 2 with one block on stderr where nothing can be exported."""
    parser = Parser(prog="python -m newllm.export", description=__doc__)
    parser.add_argument("run", type=folder, help="run folder of a Pythia stack without feedback")
    parser.add_argument("folder", type=folder, help="folder to write; it must not exist")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="which weights (best)")
    given = parser.parse_args(arguments)
    try:
        export(given.run, given.folder, checkpoint=given.checkpoint)
    except ValueError as error:
        refuse(str(error).splitlines())
    except OSError as error:
        refuse([f"{given.folder}: {error.strerror or error}. Allowed: a folder that can be written. Name another."])
    print(f"exported: {given.folder}")
    print(f"read it back: python train.py {shlex.join(reading_back(given.run, given.folder))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
