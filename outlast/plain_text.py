"""Other people's text, made safe to show: on a terminal it must not move the cursor, nor look like outlast's own."""

from __future__ import annotations

import unicodedata
from typing import Any

_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode's categories of characters that are not seen themselves."""


def plain_text(text: str, keep: str = "") -> str:
    """The text with control characters, and those that change the direction of writing, made visible: ``\\x1b``.

    Host names, error texts and names in files are other people's: on a terminal or a page they must not move the
    cursor, hide a line, or look like one of outlast's own. A line break becomes a space.

    Args:
        text: any.
        keep: characters that stay as they are.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char
        if char in keep or unicodedata.category(char) not in _UNSEEN
        else (" " if char == "\n" else char.encode("unicode_escape").decode())
        for char in text
    )


def plain_value(value: Any) -> Any:
    """A JSON value with all its texts made plain."""
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, list):
        return [plain_value(item) for item in value]
    if isinstance(value, dict):
        return {plain_text(key): plain_value(item) for key, item in value.items()}
    return value
