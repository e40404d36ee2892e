"""The library sources of the running Python: text that is always there, one document per module."""

import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from newllm.config.schema import DataConfig, TokenizerConfig
from newllm.data.corpus import prepare_text
from newllm.data.document import Document, Source
from newllm.data.prepared import PreparedData
from newllm.data.records import text_form
from newllm.data.split_rule import split_rule
from newllm.data.text_files import content_hash

# Installed packages are not the library; tests hold made-up data and files broken on purpose.
LEFT_OUT_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"})


@dataclass(frozen=True, kw_only=True)
class StdlibConfig(DataConfig):
    """Sources of the Python standard library; whole modules are held out."""

    validation: str | None  # documents "first:last" (last excluded), or a text file; null chooses by hash


def module_files(folder: Path) -> list[Path]:
    """Return the library's modules under a folder, sorted by path."""
    files = (path.relative_to(folder) for path in folder.rglob("*.py"))
    return [folder / path for path in sorted(files) if LEFT_OUT_FOLDERS.isdisjoint(path.parts)]


def module_name(path: Path, folder: Path) -> str:
    """Return the dotted name under which a file is imported."""
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def read_modules(folder: Path, skipped: Counter[str]) -> Iterator[Document]:
    """Yield one document per module, decoded as the module declares."""
    for path in module_files(folder):
        try:
            with tokenize.open(path) as file:
                yield Document(file.read(), f"stdlib/{module_name(path, folder)}", "stdlib")
        except (UnicodeDecodeError, SyntaxError):
            skipped["not decodable"] += 1


def prepare(data: StdlibConfig, tokenizer: TokenizerConfig) -> PreparedData:
    """Return the standard library as blocks of tokens."""
    folder = Path(sysconfig.get_path("stdlib"))
    signature = {"kind": "stdlib", "sha256": content_hash(module_files(folder))}
    source = Source("stdlib", signature, partial(read_modules, folder))
    rule = split_rule(data.validation, data, form=text_form("text"))
    return prepare_text(source, data, tokenizer, rule)
