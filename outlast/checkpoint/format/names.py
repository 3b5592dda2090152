"""Names in a checkpoint: steps, ranks, and keys of the state as path components that every store accepts.

::

    URL/
      step_00000040/
        zarr.json                   the root group; its attribute ``outlast`` has step, epoch, world size
        model/blocks.0.w/zarr.json  replicated state; each rank writes an equal share of its bytes
        model/blocks.0.w/c.0.0
        rank_00000/...              local state, written by its rank
        packed/rank_00000.0/...     small tensors of either, as many as fit into a chunk, written by rank 0
        votes/rank_00000.json       what rank 0 wrote: files, sizes, checksums
        commit.json                 without it there is no checkpoint
      step_00000030.aside-1/        damaged or superseded; never read
      step_00000040.replaced/       is being overwritten; becomes the step again if that is interrupted
      earlier-1/step_00000020/      of an earlier run, moved away because a run began anew here
      lease_00000001.json           which job saves here; removed when it ends
      step_00000040.failed-E-S      a rank gave up this save (attempt E, save S), for the reason in it
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

from outlast.errors import CheckpointError

HEADER = "outlast"
"""The root group's attribute that says what the checkpoint is; no key of the state may have this name."""
CONTAINER = "outlast_container"
"""The attribute of a group that says which type of container it is, and which keys in which order."""
MEMORY, PARTNER, LOCAL_DISK, STORAGE = "memory", "partner", "local", "storage"
"""The tiers, as events name them."""
COMMIT = "commit.json"
VOTES = "votes"
"""The folder of the ranks' votes."""
PACKS = "packed"
"""The group of all ranks' small tensors."""
NODE = "zarr.json"
"""The metadata document of a Zarr group or array."""

EARLIER = re.compile(r"earlier-([0-9]+)")
"""The folder of the steps that a run which began anew has moved away."""
_STEP = re.compile(r"step_([0-9]{8,})")
_ASIDE = re.compile(r"step_([0-9]{8,})\.aside-([0-9]{1,18})")
_REPLACED = re.compile(r"step_([0-9]{8,})\.replaced")
_FAILED = re.compile(r"step_([0-9]{8,})\.failed-(.+)-([0-9]+)")
_RESERVED = re.compile(r"votes|packed|commit\.json|rank_[0-9]+")
_PACK = re.compile(r"packed/rank_([0-9]{5,})\.[0-9]+/.+")
_LOCAL = re.compile(r"rank_([0-9]{5,})/.+")
_INTEGER = re.compile(r"~-?[0-9]+")
_MAX_NAME_BYTES = 255
_USUAL = re.compile(rf"(?!zarr\.json\Z)[A-Za-z0-9][A-Za-z0-9_.-]{{0,{_MAX_NAME_BYTES - 1}}}")
"""Keys that are path components as they are, unless they are at the root."""
_MAX_INTEGER_BITS = 256
_PLAIN = " +=,@()_.-~"


def step_name(step: int) -> str:
    """The folder of a step, e.g. ``step_00000040``."""
    return f"step_{step:08d}"


def _is_step(digits: str) -> bool:
    """Whether a save writes a step's number like this: otherwise the folder is not one of outlast's."""
    return len(digits) < 20 and f"{int(digits):08d}" == digits and int(digits) < 1 << 63


def parse_step(name: str) -> int | None:
    """The step of a folder's name, or None if it is not one of a step."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match and _is_step(match[1]) else None


def parse_aside(name: str) -> int | None:
    """The step of a folder that is set aside, or None."""
    match = _ASIDE.fullmatch(name)
    return int(match[1]) if match and _is_step(match[1]) else None


def replaced_name(step: int) -> str:
    """The folder of a committed step while it is being overwritten."""
    return f"{step_name(step)}.replaced"


def parse_replaced(name: str) -> int | None:
    """The step of such a folder, or None."""
    match = _REPLACED.fullmatch(name)
    return int(match[1]) if match and _is_step(match[1]) else None


def rank_name(rank: int) -> str:
    """The group of a rank's local state, e.g. ``rank_00000``."""
    return f"rank_{rank:05d}"


def pack_path(rank: int, number: int) -> str:
    """The path of an array of small tensors that a rank writes, relative to the step."""
    return f"{PACKS}/{rank_name(rank)}.{number}"


def parse_pack(path: str) -> int | None:
    """The rank whose pack a file (relative to the step) belongs to, or None."""
    match = _PACK.fullmatch(path)
    return int(match[1]) if match else None


def parse_local(path: str) -> int | None:
    """The rank whose local state a file (relative to the step) or packed tensor belongs to; None: replicated state."""
    match = _LOCAL.fullmatch(path)
    return int(match[1]) if match else None


def vote_path(step: int, rank: int) -> str:
    """The path of a rank's vote, relative to the URL."""
    return f"{step_name(step)}/{VOTES}/{rank_name(rank)}.json"


def failed_name(step: int, attempt_id: str, save_id: int) -> str:
    """The empty file by which a rank tells the others that it gave up this save."""
    return f"{step_name(step)}.failed-{encode_key(attempt_id)}-{save_id}"


def parse_failed(name: str) -> tuple[str, int] | None:
    """(epoch, save number) of such a file, or None."""
    match = _FAILED.fullmatch(name)
    return (unquote(match[2]), int(match[3])) if match else None


def encode_key(key: str | int, *, at_root: bool = False) -> str:
    """A key of the state as one path component; :func:`decode_key` is its inverse.

    Letters, digits and ``_.-`` stay, so parameter names read naturally; ``/`` and anything that a store, a glob or Zarr
    could misread becomes ``%XX``. The integer 5 becomes ``~5``, which no string does.

    Raises:
        CheckpointError: the key is empty, or not a string or integer, or its encoded form is longer than file systems
            allow.
    """
    if type(key) is str and _USUAL.fullmatch(key) and not at_root:
        return key
    if type(key) is int:
        return f"~{key}"
    if not isinstance(key, str):
        raise CheckpointError(
            f"the state has the key {key!r}", "keys must be strings; below the top level integers are allowed too"
        )
    if not key:
        raise CheckpointError("an empty string is a key of the state", "every key needs a name")
    try:
        name = quote(key, safe=_PLAIN)
    except UnicodeEncodeError as error:
        raise CheckpointError(f"the key {key!r} is not valid Unicode text") from error
    special = (
        name.startswith(("__", "~", " "))
        or set(name) == {"."}
        or name == NODE
        or (at_root and _RESERVED.fullmatch(name))
    )
    if special:
        name = f"%{ord(name[0]):02X}{name[1:]}"
    if len(name) > _MAX_NAME_BYTES:
        raise CheckpointError(
            f"the key {key[:60]!r}... is {len(name)} bytes long as a file name; the limit is {_MAX_NAME_BYTES}",
            "shorten the key",
        )
    return name


def fits(key: str | int) -> bool:
    """Whether a key becomes a path component by :func:`encode_key`, which refuses others."""
    if type(key) is int:
        return key.bit_length() <= _MAX_INTEGER_BITS
    text = str(key)
    if _USUAL.fullmatch(text):
        return True
    if text.isascii():  # each character takes up to three bytes
        return bool(text) and (3 * len(text) <= _MAX_NAME_BYTES or len(quote(text, safe=_PLAIN)) + 2 <= _MAX_NAME_BYTES)
    try:
        return len(quote(text, safe=_PLAIN)) + 2 <= _MAX_NAME_BYTES
    except UnicodeEncodeError:
        return False


def decode_key(name: str) -> str | int:
    """The key that :func:`encode_key` turned into this path component."""
    return int(name[1:]) if _INTEGER.fullmatch(name) else unquote(name, errors="strict")


def readable(path: str) -> str:
    """The keys of a path relative to the step, joined by ``/``."""
    return "/".join(str(decode_key(part)) for part in path.split("/"))
