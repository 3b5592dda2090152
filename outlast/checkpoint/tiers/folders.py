"""The folders of a node's memory and of its own disk: ours alone, and with names that nobody can take before us.

::

    /dev/shm/outlast-UID-ckpt-HASH-RANDOM/   HASH: of the URL of the checkpoints

``/dev/shm`` is open to all users of a machine, and a disk's folder may be. Whoever knows a name can make that folder
first, and so keep the owner from saving. So a new folder has a random part in its name, on which the ranks agree, and
a later start finds it by the rest: what begins so counts if it is a folder of this user's. What others have made is
passed over. (Versions before made the folder without the random part; it is found, too.)
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from outlast.checkpoint.format.names import PARTNER
from outlast.checkpoint.peers.collectives import Agreement
from outlast.checkpoint.peers.topology import node_name
from outlast.checkpoint.storage.local import sync_dir
from outlast.errors import CheckpointError

SHM_ROOT = Path("/dev/shm")
OWN = "own"
"""The folder of what this node's ranks saved; a partner's copies are in a folder with the name of that tier."""
_CHOOSE = "choose a writable folder on this node's own disk, or set checkpoint.local_every_steps = 0"
_RANDOM_BYTES = 8


def plain_name(url: str) -> str:
    """What the name of a folder for the checkpoints at ``url`` begins with."""
    return f"outlast-{os.getuid()}-ckpt-{hashlib.sha256(url.encode()).hexdigest()[:16]}"


def find_folder(url: str, root: Path = SHM_ROOT) -> Path | None:
    """Our folder for the checkpoints at ``url``, the one that was used last if there are several; None: there is none.

    Raises:
        CheckpointError: there is one that is ours, but open to others; or the root cannot be listed.
    """
    begin = plain_name(url)
    found: list[tuple[int, Path]] = []
    try:
        names = [name for name in os.listdir(root) if name == begin or name.startswith(f"{begin}-")]
    except (FileNotFoundError, NotADirectoryError):  # the first is made, and the second told, when a folder is made
        return None
    except OSError as error:
        raise CheckpointError(f"{root} cannot be listed: {error}", "fix its permissions, or choose another") from error
    for name in names:
        folder = root / name
        with suppress(FileNotFoundError):  # just removed, at the end of a run or by hand
            info = folder.lstat()
            if stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid():
                check_ours(folder)
                inner = folder / OWN
                found.append(((inner if inner.is_dir() else folder).stat().st_mtime_ns, folder))
    return max(found)[1] if found else None


def agree_on_names(agreement: Agreement, url: str, roots: Sequence[Path]) -> list[str]:
    """The name of this node's folder below each of some roots, the same for all ranks of the node; collective.

    A folder that is there goes on being used; new ones are called alike on all nodes.

    Args:
        agreement: over all ranks.
        url: of the checkpoints.
        roots: of shared memory, and of this node's disk.

    Raises:
        CheckpointError: see :func:`find_folder`; on all ranks.
    """
    names: list[str | None] = []
    problem = ""
    try:
        names = [None if (folder := find_folder(url, root)) is None else folder.name for root in roots]
    except CheckpointError as error:
        problem = str(error)
    fresh = f"{plain_name(url)}-{secrets.token_hex(_RANDOM_BYTES)}"
    of_all = [json.loads(text) for text in agreement.all_gather_text(json.dumps([problem, node_name(), fresh, names]))]
    problems = [f"rank {rank}: {found[0]}" for rank, found in enumerate(of_all) if found[0]]
    if problems:
        raise CheckpointError(problems[0])
    first_here = next(found for _, node, _, found in of_all if node == node_name())
    return [name or of_all[0][2] for name in first_here]


def memory_folder(url: str, root: Path = SHM_ROOT, name: str | None = None) -> Path:
    """The folder of this node's memory for the checkpoints at ``url``; it is made if it is missing.

    Args:
        url: of the checkpoints.
        root: of shared memory.
        name: of the folder; None: that of the one that is there, or a new one.

    Raises:
        CheckpointError: there is no shared memory, or the folder is a link, another user's, or open to others.
    """
    fix = f"{root} must be a writable tmpfs (docker: --shm-size), or set checkpoint.memory_every_steps = 0"
    return _own_folder(_named(url, root, name), (OWN, PARTNER), "shared memory", fix)


def local_folder(url: str, root: Path, name: str | None = None) -> Path:
    """As :func:`memory_folder`, of this node's disk, below ``root``.

    Raises:
        CheckpointError: it cannot be made, or is a link, another user's, or open to others.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"checkpoint.local_dir {root} cannot be made: {error}", _CHOOSE) from error
    folder = _own_folder(_named(url, root, name), (OWN,), "the local disk's", _CHOOSE)
    for path in (folder, root, root.parent):
        sync_dir(str(path))
    return folder


def memory_path(url: str, root: Path = SHM_ROOT) -> Path:
    """The path of the folder that is there; if there is none, what the path of one begins with."""
    return find_folder(url, root) or root / plain_name(url)


def _named(url: str, root: Path, name: str | None) -> Path:
    if name is not None:
        return root / name
    return find_folder(url, root) or root / f"{plain_name(url)}-{secrets.token_hex(_RANDOM_BYTES)}"


def _own_folder(folder: Path, below: Sequence[str], what: str, fix: str) -> Path:
    try:
        # Each is checked before anything is made in it: a link of another user's would lead elsewhere.
        for path in (folder, *(folder / name for name in below)):
            with suppress(FileExistsError):
                path.mkdir(mode=0o700)
            check_ours(path, what)
    except OSError as error:
        raise CheckpointError(f"{what} {folder} cannot be made: {error}", fix) from error
    return folder


def check_ours(folder: Path, what: str = "shared memory") -> None:
    """Raise :class:`CheckpointError` if the folder is a link, another user's, or open to others."""
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise CheckpointError(
            f"{what} {folder} is refused: it must be a folder that is ours alone, but has mode "
            f"{stat.S_IMODE(info.st_mode):04o} and belongs to user {info.st_uid}",
            "look at it, and remove it if it is a leftover",
        )
