"""Every error outlast raises on purpose, as one tree.

::

    OutlastError
    ├── ConfigError                  a setting is wrong
    │   ├── UnknownKey               no such setting; names the nearest right one
    │   └── OutOfRange               a value outside what the setting allows
    ├── TrainingDiverged             the loss or the gradient norm is not a finite number
    ├── DataError                    no training data, or not the data the checkpoint was made with
    ├── RunDirectoryError            a run's directory is used, or cannot be written
    ├── CommError                    gradients could not be exchanged as asked
    │   ├── UnknownCompressor        no compressor or feedback of that name
    │   ├── NonFiniteGradient        NaN or Inf in a gradient that is to be compressed
    │   └── CommStateMismatch        error-feedback state that does not fit the parameters
    ├── CheckpointError              a checkpoint could not be written or read
    │   ├── CheckpointNotFound       no complete checkpoint where one was asked for
    │   ├── CorruptCheckpoint        a file's bytes are not those that were written; names the file
    │   ├── IncompleteCheckpoint     a file or the commit record is missing
    │   ├── UnknownFormatVersion     written by a version of outlast this one cannot read
    │   ├── StateMismatch            its tensors are not those of the running model
    │   └── SnapshotMutated          a tensor was changed before its snapshot was copied; names it
    ├── DiagnosticsError             events or a recorder's ring could not be read
    ├── LaunchError                  ranks could not be started or kept running
    │   ├── PlaceError               the environment does not tell which rank this is
    │   ├── PortInUse                the rendezvous port is taken
    │   └── RanksFailed              ranks failed more often than restarts were allowed
    └── MissingDependency            an optional package or system tool is not installed

A message has up to three parts: what happened, with the values; and what to do about it.
``outlast`` on the command line prints them without a traceback and exits with status 1
(2 for a :class:`ConfigError`). An error whose class is ``hopeless`` cannot be mended by starting the ranks again: the
launcher does not try.
"""

from __future__ import annotations

from typing import ClassVar


class OutlastError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: what happened, with the values that matter.
        fix: what the reader can do about it; shown on a line of its own.
    """

    hopeless: ClassVar[bool] = False
    """Whether starting the same ranks again would end in the same error."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what, fix)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n  what to do: {self.fix}" if self.fix else self.what


class ConfigError(OutlastError):
    """A setting is wrong."""

    hopeless = True


class UnknownKey(ConfigError):
    """There is no such setting."""


class OutOfRange(ConfigError):
    """A value outside what the setting allows."""


class TrainingDiverged(OutlastError):
    """The loss or the gradient norm is not a finite number."""

    hopeless = True


class DataError(OutlastError):
    """No training data, or not the data the checkpoint was made with."""

    hopeless = True


class RunDirectoryError(OutlastError):
    """A run's directory is used, or cannot be written."""

    hopeless = True


class CommError(OutlastError):
    """Gradients could not be exchanged as asked."""


class UnknownCompressor(CommError, ConfigError):
    """No compressor or feedback of that name."""


class NonFiniteGradient(CommError):
    """NaN or Inf in a gradient that is to be compressed."""


class CommStateMismatch(CommError):
    """Error-feedback state that does not fit the parameters."""

    hopeless = True


class CheckpointError(OutlastError):
    """A checkpoint could not be written or read."""


class CheckpointNotFound(CheckpointError):
    """No complete checkpoint where one was asked for."""

    hopeless = True


class CorruptCheckpoint(CheckpointError):
    """A file's bytes are not those that were written."""


class IncompleteCheckpoint(CheckpointError):
    """A file or the commit record is missing."""


class UnknownFormatVersion(CheckpointError):
    """Written by a version of outlast that this one cannot read."""

    hopeless = True


class StateMismatch(CheckpointError):
    """A checkpoint's tensors are not those of the running model."""

    hopeless = True


class SnapshotMutated(CheckpointError):
    """A tensor was changed before its snapshot was copied."""


class DiagnosticsError(OutlastError):
    """Events or a recorder's ring could not be read."""


class LaunchError(OutlastError):
    """Ranks could not be started or kept running."""


class PlaceError(LaunchError):
    """The environment does not tell which rank this process is."""


class PortInUse(LaunchError):
    """The rendezvous port is taken."""


class RanksFailed(LaunchError):
    """Ranks failed more often than restarts were allowed."""


class MissingDependency(OutlastError):
    """An optional package or system tool is not installed."""

    hopeless = True
