"""A random key in a run's directory, from which the name of its shared memory is made."""

from __future__ import annotations

import errno
import os
import re
import secrets
import time
from contextlib import suppress
from pathlib import Path

from outlast.errors import DiagnosticsError

KEY_FILE = "shared_memory.key"
_KEY_BYTES = 16
_KEY = re.compile(rb"[0-9a-f]{32}\n")
_LOOKS = 20
_PAUSE_S = 0.1
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def run_key(run_dir: Path) -> str:
    """The key of a run, made with mode 0600 by whoever asks first; all processes of all nodes get the same.

    Args:
        run_dir: on storage that the run's nodes share; it is made if it is missing.

    Raises:
        DiagnosticsError: it cannot be read or made, or is no such key.
    """
    path = run_dir / KEY_FILE
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(path):
            _make(path)
        data = _read(path)
        for _ in range(_LOOKS):
            if len(data) > 2 * _KEY_BYTES:
                break
            time.sleep(_PAUSE_S)  # another process is just writing it
            data = _read(path)
    except OSError as error:
        raise DiagnosticsError(
            f"the key of the run's shared memory, {path}, can be neither read nor made: {error.strerror}",
            "the run's directory must be writable, and belong to the user who trains",
        ) from error
    if not _KEY.fullmatch(data):
        raise DiagnosticsError(
            f"{path} is not the key of a run's shared memory", "remove it while no job of this run is alive"
        )
    return data.decode().strip()


def _read(path: Path) -> bytes:
    with open(os.open(path, _OPEN), "rb", buffering=0) as file:
        return file.read(2 * _KEY_BYTES + 2) or b""


def _make(path: Path) -> None:
    """Never over another's, and whole where the file system has hard links: it is written beside its place."""
    beside = path.with_name(f".{KEY_FILE}.{secrets.token_hex(8)}")
    try:
        _write(beside)
        os.link(beside, path)
    except FileExistsError:
        pass  # another process was first
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with suppress(FileExistsError):
            _write(path)
    finally:
        beside.unlink(missing_ok=True)


def _write(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb", buffering=0) as file:
            file.write(secrets.token_hex(_KEY_BYTES).encode() + b"\n")
            os.fsync(fd)
    except OSError:
        path.unlink(missing_ok=True)
        raise
