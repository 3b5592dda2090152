"""A rank's output that ends nothing: what a full disk refuses is counted, and told as soon as there is room."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class LastingFile(io.FileIO):
    """A file whose writes do not fail for want of room. Other errors are raised as ever.

    As soon as something can be written again, a line before it says how many bytes are missing.
    """

    lost_bytes = 0
    """Not written, and not told of yet."""

    def write(self, data: ReadableBuffer) -> int:
        """Write some of it, or count it all as lost; returns how many bytes are done with."""
        nbytes = memoryview(data).nbytes
        try:
            if self.lost_bytes:
                self._tell()
            return super().write(data)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            self.lost_bytes += nbytes
            return nbytes

    def _tell(self) -> None:
        note = f"\n(outlast: {self.lost_bytes} bytes before this could not be written: the disk was full)\n".encode()
        if super().write(note) < len(note):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.lost_bytes = 0


def open_lasting(path: Path) -> io.TextIOWrapper:
    """A text file to append to."""
    return io.TextIOWrapper(io.BufferedWriter(LastingFile(path, "a")), encoding="utf-8")


def make_output_last() -> None:
    """Let ``sys.stdout`` and ``sys.stderr`` of this process end nothing, where they go to files.

    A program prints, and few expect that it may fail; the launcher sends what most ranks print to files in the run's
    directory.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper) or not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            continue
        stream.flush()
        raw = LastingFile(stream.fileno(), "w", closefd=False)
        raw.name = stream.name
        is_buffered = not isinstance(stream.buffer, io.RawIOBase)  # it is one under python -u
        lasting = io.TextIOWrapper(
            io.BufferedWriter(raw) if is_buffered else raw,
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, lasting)
        setattr(sys, f"__{name}__", lasting)
