"""Keys of a state's containers: as path components, and as attributes of a group.

Any key that JSON can hold with its type will do. Strings and integers read as they are; of others, of very long strings
and of those that are no valid text, the component is a digest, and the group's attribute has the key.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from outlast.checkpoint.format.json_values import VALUES, key_text
from outlast.checkpoint.format.kinds import CannotStore
from outlast.checkpoint.format.names import CONTAINER, encode_key, fits
from outlast.errors import CheckpointError

_DIGITS = 32


def component(key: Any, *, at_root: bool = False) -> str:
    """A key as one path component; different keys of one container have different ones.

    Raises:
        CannotStore: the key is of a type that cannot be stored.
    """
    if is_plain(key):
        return encode_key(key, at_root=at_root)
    text = json.dumps(encoded_key(key), sort_keys=True)
    return f"~k{hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]}"


def is_plain(key: Any) -> bool:
    """Whether a key's component tells the key."""
    return (type(key) is str or type(key) is int) and fits(key)


def attribute_name(key: Any) -> str:
    """The name of the attribute that holds the value under a key; different keys have different ones."""
    if type(key) is str and key != CONTAINER and not key.startswith("~"):
        return key
    return f"~{component(key)}"


def encoded_key(key: Any) -> Any:
    """A key as JSON.

    Raises:
        CannotStore: its type cannot be stored.
    """
    if type(key) is str or (type(key) is int and fits(key)):
        return key
    try:
        return VALUES.encode(key, lambda path: f"has the key {key_text(key)[:80]!r}, which")
    except CheckpointError as error:
        raise CannotStore(error.what, error.fix) from error
