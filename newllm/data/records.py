"""How a record, a line of a file or a row of a table, becomes a text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


def _no_source(record: Mapping[str, Any]) -> str | None:
    return None


@dataclass(frozen=True)
class RecordForm:
    """The form of the records of a corpus.

    Attributes:
        field: must be in every record, and holds the text.
        text_of: value of the field -> its text; None if the value is not of this form.
        expected: what the field holds, in words, as it stands after "has no".
        advice: what to do about a record that does not fit.
        other_fields: read where a record has them.
        source_of: record -> name of the part of the corpus it belongs to; None where it does not say.
        is_plain: the text of a .txt file is such a text too.
        signature: plain value that differs whenever texts may differ.
    """

    field: str
    text_of: Callable[[Any], str | None]
    expected: str
    advice: str
    signature: str
    other_fields: tuple[str, ...] = ()
    source_of: Callable[[Mapping[str, Any]], str | None] = _no_source
    is_plain: bool = False

    def read(self, record: object, where: str) -> str:
        """Return the text of a record.

        Args:
            record: of a file or table.
            where: file and place, for messages.
        Raises:
            ValueError: the record has no such text.
        """
        if not isinstance(record, Mapping):
            raise ValueError(
                f"{where}: is not a JSON object. Allowed: an object with the field {self.field}. Correct the line."
            )
        text = self.text_of(record.get(self.field))
        if text is None:
            raise ValueError(self._refusal(record, where))
        return text

    def _refusal(self, record: Mapping[str, Any], where: str) -> str:
        has_field = self.field in record
        what = f"has no {self.expected} in its field" if has_field else f"has no {self.expected} field"
        usable = sorted(key for key, value in record.items() if self.text_of(value) is not None)
        allowed = f"fields with {self.expected}, here {', '.join(usable) or 'none'}"
        return f"{where}: {what} {self.field}. Allowed: {allowed}. {self.advice}"


def plain_text(value: Any) -> str | None:
    """Return the value if it is a text."""
    return value if isinstance(value, str) else None


def text_form(field: str) -> RecordForm:
    """Return the form of records that hold their text in a field."""
    advice = "Set data.text_field or correct the line."
    return RecordForm(field, plain_text, "text", advice, signature=field, is_plain=True)
