"""Short conversations of the package chatterbot-corpus (BSD), turned into messages."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from newllm.config.schema import DataConfig, TokenizerConfig
from newllm.data.corpus import prepare_text
from newllm.data.document import Document, Source
from newllm.data.messages import messages_form
from newllm.data.prepared import PreparedData
from newllm.data.records import RecordForm
from newllm.data.split_rule import split_rule

ROLES = ("user", "assistant")  # who speaks takes turns


@dataclass(frozen=True, kw_only=True)
class ChatConfig(DataConfig):
    """Conversations of a few lines; whole conversations are held out."""

    language: str  # folder of the package's data
    format: Literal["plain", "chat_template"]
    chat_template: str  # Jinja over messages, each with role and content
    validation: (
        str | None
    )  # conversations "first:last" (last excluded), or a jsonl file of messages; null chooses by hash


def data_folder(language: str) -> Path:
    """Return where the package keeps the conversations of a language.

    Raises:
        ValueError: it has none.
    """
    spec = find_spec("chatterbot_corpus")
    assert spec is not None, "chatterbot-corpus is installed with newllm"
    assert spec.origin is not None, "chatterbot-corpus has a file of its own"
    folder = Path(spec.origin).parent / "data"
    languages = sorted(path.name for path in folder.iterdir() if any(path.glob("*.yml")))
    if language not in languages:
        raise ValueError(
            f"data.language={language}: has no conversations. Allowed: {', '.join(languages)}. Choose one of these."
        )
    return folder / language


def read_conversations(folder: Path, form: RecordForm, skipped: Counter[str]) -> Iterator[Document]:
    """Yield one document per conversation; who speaks takes turns, the user begins."""
    import yaml

    for path in sorted(folder.glob("*.yml")):
        conversations = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)["conversations"]
        for number, lines in enumerate(conversations, start=1):
            where = f"{path.name}:{number}"
            if not isinstance(lines, list) or len(lines) < len(ROLES):
                skipped["conversation without an answer"] += 1
                continue
            # YAML reads some answers as numbers, yes and no.
            messages = [{"role": ROLES[turn % 2], "content": str(line)} for turn, line in enumerate(lines)]
            yield Document(form.read({"messages": messages}, where), where, f"chat/{path.stem}")


def prepare(data: ChatConfig, tokenizer: TokenizerConfig) -> PreparedData:
    """Return the conversations as blocks of tokens."""
    form, folder = messages_form(data.format, data.chat_template), data_folder(data.language)
    signature = {
        "kind": "chat",
        "chatterbot-corpus": version("chatterbot-corpus"),
        "language": data.language,
        "form": form.signature,
    }
    source = Source("chat", signature, partial(read_conversations, folder, form))
    return prepare_text(source, data, tokenizer, split_rule(data.validation, data, form=form))
