"""Operations on storage that is reached over a network: transient failures are retried a few times.

This is the only place that retries. The retries of client libraries, which would multiply with these, are turned off
where outlast knows how (see :mod:`outlast.checkpoint.storage.fsspec`).
"""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

_log = logging.getLogger("outlast.checkpoint")
T = TypeVar("T")

TRIES = 5
FIRST_PAUSE_S = 0.2
"""Doubles with each further try; up to half of it is added at random, so that ranks do not retry all at once."""
RETRY_FOR_S = 30.0
"""No try begins later than this after the first. If a client waits at most ``t`` seconds, an operation takes at most
30 s + ``t``. S3's client waits 5 s for a connection and 15 s for an answer; for writes see
:mod:`outlast.checkpoint.storage.fsspec`."""

_PERMANENT = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_MISTAKES = (TypeError, ValueError, AttributeError, LookupError, NotImplementedError, ImportError, AssertionError)
_TRANSIENT = {
    errno.EIO,
    errno.EREMOTEIO,
    errno.EBUSY,
    errno.EAGAIN,
    errno.EINTR,
    errno.EPIPE,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENETRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
}


def retry(where: str, call: Callable[[], T]) -> T:
    """The result of a call that may be repeated after any failure.

    Args:
        where: whole path of the file, for the error.
        call: one operation of a client library.

    Raises:
        ConnectionError: every try failed with a transient error (no answer, server errors, too many requests), or the
            bucket does not exist: nothing is known about the file.
        FileNotFoundError, FileExistsError, PermissionError, OSError: it failed with a permanent error.
    """
    began = time.monotonic()
    pause_s = FIRST_PAUSE_S
    for tried in range(1, TRIES + 1):
        try:
            return call()
        except Exception as error:  # libraries raise their own errors; callers expect OSError
            if "NoSuchBucket" in _codes(error):
                raise ConnectionError(f"{where}: the bucket does not exist: {error}") from error
            if not is_transient(error):
                raise _permanent(where, error) from error
            took_s = time.monotonic() - began
            if tried == TRIES or took_s + pause_s > RETRY_FOR_S:
                tries = f"{tried} of {TRIES} tries in {took_s:.1f} s"
                raise ConnectionError(f"{where}: given up after {tries}, last error: {_text(error)}") from error
            _log.info("%s: try %d of %d failed, retrying: %s", where, tried, TRIES, _text(error))
        time.sleep(pause_s * (1 + random.random() / 2))
        pause_s *= 2
    raise AssertionError("unreachable")


def is_transient(error: Exception) -> bool:
    """Whether the same call may succeed later. Libraries' own errors count as transient: the retries are bounded."""
    if isinstance(error, _PERMANENT) or "PreconditionFailed" in _codes(error):
        return False
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    if isinstance(error, OSError):
        # Errors of name resolution have negative numbers.
        return error.errno is None or error.errno < 0 or error.errno in _TRANSIENT
    return not isinstance(error, _MISTAKES)


def _permanent(where: str, error: Exception) -> OSError:
    """The same error, with the file's whole path."""
    text = f"{where}: {_text(error)}"
    if isinstance(error, FileExistsError) or "PreconditionFailed" in _codes(error):
        return FileExistsError(errno.EEXIST, text)
    for kind in _PERMANENT:
        if isinstance(error, kind):
            return kind(error.errno or 0, text) if error.errno else kind(text)
    return OSError(error.errno, text) if isinstance(error, OSError) and error.errno else OSError(text)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _codes(error: BaseException) -> set[str]:
    """Error codes in the S3 responses that caused an error."""
    answers = (getattr(cause, "response", None) for cause in _causes(error))
    return {str(answer.get("Error", {}).get("Code")) for answer in answers if isinstance(answer, dict)}


def _causes(error: BaseException | None) -> Iterator[Any]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
