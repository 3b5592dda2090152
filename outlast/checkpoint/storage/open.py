"""The store for a path or a URL."""

from __future__ import annotations

import os

import fsspec

from outlast.checkpoint.storage.base import Store
from outlast.checkpoint.storage.fsspec import FsspecStore, open_filesystem
from outlast.checkpoint.storage.local import LocalStore
from outlast.config import nearest
from outlast.errors import ConfigError, MissingDependency


def open_store(url: str | os.PathLike[str]) -> Store:
    """The store at a path or URL. Does not access it.

    Raises:
        MissingDependency: the package for this protocol is not installed; names the extra.
        ConfigError: the protocol does not exist.
    """
    text = os.fspath(url)
    protocol, separator, rest = text.partition("://")
    if not separator:
        return LocalStore(text)
    if protocol in ("file", "local"):
        return LocalStore(rest)
    try:
        filesystem, root = open_filesystem(text, protocol)
    except ImportError as error:
        extra = "s3" if protocol in ("s3", "s3a") else None
        fix = f"pip install 'outlast[{extra}]'" if extra else "install the package that the message names"
        raise MissingDependency(
            f"{text}: checkpoints at {protocol}:// need a package that is not installed: {error}", fix
        ) from error
    except ValueError as error:
        hint = nearest(protocol, fsspec.available_protocols())
        raise ConfigError(f"checkpoint.url = {text!r}: {error}", hint) from error
    return FsspecStore(text.rstrip("/"), filesystem, root)
