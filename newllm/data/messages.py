"""Dialogues as text: messages, each with a role and a content, written plainly or by a chat template."""

from functools import partial
from typing import Any, Literal

from newllm.data.records import RecordForm

Format = Literal["plain", "chat_template"]
EXAMPLE = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]


def is_dialogue(value: Any) -> bool:
    """Return whether the value is a list of messages."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(message, dict) and isinstance(message.get(key), str)
            for message in value
            for key in ("role", "content")
        )
    )


def render(messages: Any, *, format: Format, chat_template: str) -> str | None:
    """Return a whole dialogue as text; None if the value is no list of messages.

    Args:
        messages: each with role and content.
        format: "plain" is the contents, one line below the other; "chat_template" renders the template.
        chat_template: Jinja, as `transformers` renders it.
    """
    if not is_dialogue(messages):
        return None
    if format == "plain":
        return "\n".join(message["content"] for message in messages)
    from transformers.utils.chat_template_utils import render_jinja_template

    return str(render_jinja_template([messages], chat_template=chat_template)[0][0])


def messages_form(format: Format, chat_template: str) -> RecordForm:
    """Return the form of records that hold a dialogue in their field `messages`.

    Raises:
        ValueError: the template cannot be rendered, or leaves contents out.
    """
    from jinja2 import TemplateError

    text_of = partial(render, format=format, chat_template=chat_template)
    try:
        example = text_of(EXAMPLE) or ""
    except TemplateError as error:
        raise ValueError(
            f"data.chat_template: cannot be rendered ({error}). Allowed: a Jinja template over messages, each with role "
            "and content. Correct it or choose data.format=plain."
        ) from None
    if any(message["content"] not in example for message in EXAMPLE):
        raise ValueError(
            f"data.chat_template: leaves the content of a message out (it makes {example!r}). Allowed: a Jinja template that "
            "writes every message's content. Correct it or choose data.format=plain."
        )
    advice = "Correct the record, or choose data=jsonl for texts."
    signature = format if format == "plain" else f"{format} {chat_template}"
    return RecordForm("messages", text_of, "dialogue of roles and contents", advice, signature)
