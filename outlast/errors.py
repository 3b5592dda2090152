"""Every error outlast raises on purpose, as one tree.

::

    OutlastError
    ├── ConfigError                  a setting is wrong
    │   ├── UnknownKey               no such setting; names the nearest right one
    │   └── OutOfRange               a value outside what the setting allows
    ├── EndedEarly                   training code ended the process before the last step
    ├── TrainingDiverged             the loss or the gradient norm is NaN or infinite
    ├── DataError                    no training data, or other data than the checkpoint's
    ├── RunDirectoryError            the run's directory is in use, or cannot be written
    ├── SessionError                 a program's use of outlast.Session is not what it can do
    ├── CommError                    gradients could not be exchanged
    │   ├── UnknownCompressor        no compressor or error feedback has this name
    │   ├── NonFiniteGradient        a gradient to be compressed contains NaN or infinity
    │   └── CommStateMismatch        error-feedback state does not match the parameters
    ├── CheckpointError              a checkpoint could not be written or read
    │   ├── NotDurable               training has ended, and its last checkpoint is not in storage
    │   ├── CheckpointNotFound       there is no complete checkpoint
    │   ├── CorruptCheckpoint        a file does not match its checksum; names the file
    │   ├── IncompleteCheckpoint     a file or the commit record is missing
    │   ├── UnknownFormatVersion     written in a format that this version cannot read
    │   ├── PlaceInUse               another job saves there, or did: names who
    │   ├── ReplicasDiffer           replicated state is not the same on all ranks; names what, and where
    │   ├── StateMismatch            the checkpoint's tensors do not match the model's
    │   └── SnapshotMutated          a tensor changed before its snapshot was copied; names it
    ├── DiagnosticsError             events or shared memory could not be written or read
    │   ├── SharedMemoryFull         there is no room for what launchers and reports read
    │   └── NoEvents                 no launcher or rank of the run has told anything yet
    ├── LaunchError                  ranks could not be started or kept running
    │   ├── PlaceError               the environment does not define this process's rank
    │   ├── PortInUse                a port is in use: of the rendezvous, or of what is served
    │   └── RanksFailed              ranks failed, and no restart is left or would help
    └── MissingDependency            an optional package or a system tool is not installed

A message says what happened, with the values, and on a second line what to do about it. The command line prints it
without a traceback and exits with status 1 (2 for a :class:`ConfigError`). The launcher does not restart ranks after an
error whose class is not ``restartable``: the same error would follow.
"""

from __future__ import annotations

from typing import ClassVar


class OutlastError(Exception):
    """Base class of the errors that outlast raises on purpose.

    Args:
        what: what happened, with the values that matter.
        fix: what to do about it; printed on a line of its own.
    """

    restartable: ClassVar[bool] = True
    """Whether the same ranks may succeed after a restart."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what, fix)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n  what to do: {self.fix}" if self.fix else self.what


class ConfigError(OutlastError):
    """A setting is wrong."""

    restartable = False


class UnknownKey(ConfigError):
    """No such setting."""


class OutOfRange(ConfigError):
    """A value outside what the setting allows."""


class EndedEarly(OutlastError):
    """Training code called ``sys.exit()`` with status 0 before the last step was done."""


class TrainingDiverged(OutlastError):
    """The loss or the gradient norm is NaN or infinite."""

    restartable = False


class DataError(OutlastError):
    """There is no training data, or it is not the data of the checkpoint."""

    restartable = False


class RunDirectoryError(OutlastError):
    """The run's directory is in use, or cannot be written."""

    restartable = False


class SessionError(OutlastError):
    """A program uses :class:`outlast.Session` in a way that it cannot serve."""

    restartable = False


class CommError(OutlastError):
    """Gradients, or what ranks must agree on, could not be exchanged."""

    @classmethod
    def of_lost_peer(cls, what: str, rank: int, world_size: int, error: RuntimeError) -> CommError:
        """What a process group raised in ``what`` on ``rank``, in words."""
        return cls(
            f"{what} failed on rank {rank} of {world_size}: {error}",
            "a peer died or does not answer: look at its log, and at the link to it",
        )


class UnknownCompressor(CommError, ConfigError):
    """No compressor or error feedback has this name."""


class NonFiniteGradient(CommError):
    """A gradient to be compressed contains NaN or infinity."""


class CommStateMismatch(CommError):
    """Error-feedback state does not match the parameters."""

    restartable = False


class CheckpointError(OutlastError):
    """A checkpoint could not be written or read."""


class NotDurable(CheckpointError):
    """Training has ended, and its last checkpoint could not be committed."""

    restartable = False


class CheckpointNotFound(CheckpointError):
    """There is no complete checkpoint."""

    restartable = False


class CorruptCheckpoint(CheckpointError):
    """A file does not match its checksum."""


class IncompleteCheckpoint(CheckpointError):
    """A file or the commit record is missing."""


class UnknownFormatVersion(CheckpointError):
    """The checkpoint is in a format that this version cannot read."""

    restartable = False


class PlaceInUse(CheckpointError):
    """Another job saves there, or its steps are there."""

    restartable = False


class StateMismatch(CheckpointError):
    """The checkpoint's tensors do not match the model's."""

    restartable = False


class ReplicasDiffer(CheckpointError):
    """Replicated state is not the same on all ranks."""


class SnapshotMutated(CheckpointError):
    """A tensor changed before its snapshot was copied."""


class DiagnosticsError(OutlastError):
    """Events or shared memory could not be written or read."""


class SharedMemoryFull(DiagnosticsError):
    """There is no room for a rank's heartbeat and collectives."""


class NoEvents(DiagnosticsError):
    """No launcher or rank of the run has told anything yet."""


class LaunchError(OutlastError):
    """Ranks could not be started or kept running."""


class PlaceError(LaunchError):
    """The environment does not define this process's rank."""


class PortInUse(LaunchError):
    """A port is in use: of the rendezvous, or of what is served."""


class RanksFailed(LaunchError):
    """Ranks failed, and no restart is left or would help."""


class MissingDependency(OutlastError):
    """An optional package or a system tool is not installed."""

    restartable = False
