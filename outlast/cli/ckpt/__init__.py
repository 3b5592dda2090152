"""The arguments of ``outlast ckpt ACTION``: plain data, so that reading a command line imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

Url = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="URL")]
Other = Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[OTHER]")]
Target = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TARGET")]
Source = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]


@dataclass(frozen=True, kw_only=True)
class Ls:
    """The steps there are."""

    url: Url
    """The folder or fsspec URL of a run's checkpoints."""
    step: int | None = None
    """Only this one."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Show:
    """One step's arrays."""

    url: Url
    """The folder or fsspec URL of a run's checkpoints."""
    step: int | None = None
    """Which; without it the newest."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check every byte against the checksums taken when it was saved."""

    url: Url
    """The folder or fsspec URL of a run's checkpoints."""
    step: int | None = None
    """Which; without it all."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Diff:
    """Compare two steps, tensor by tensor, bit for bit; exit status 0 if they are equal, 1 if not."""

    url: Url
    """The folder or fsspec URL of a run's checkpoints."""
    other: Other = None
    """Where the other step lies; without it at the same URL."""
    step: int | None = None
    """The step at URL; without it the newest."""
    other_step: int | None = None
    """The other step; without it the newest at OTHER."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Remove old steps; never the newest that can be restored, which is found by verifying it first."""

    url: Url
    """The folder or fsspec URL of a run's checkpoints."""
    keep_last: int
    """How many committed steps are left, at least 1."""
    aside: bool = False
    """Also remove what was set aside, and saves that were cut off. Only while no training saves there: a save under way
    looks like one that was cut off."""
    dry_run: bool = False
    """Say what would go, and remove nothing."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What lies in this node's shared memory for a run's checkpoints, of a run whose last step no storage has, say."""

    url: Url
    """The folder or fsspec URL of a run's checkpoints; its memory is found even where nothing lies there."""
    remove: bool = False
    """Give it back, on this node; refused while a run uses it."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a step's replicated state in another format; every byte is verified as it is read."""

    url: Url
    """The folder or fsspec URL of a run's checkpoints."""
    target: Target
    """A local path: a folder for dcp, else a file."""
    format: Literal["safetensors", "dcp", "torch"]
    """safetensors; dcp: torch.distributed.checkpoint; torch: a file of torch.save."""
    step: int | None = None
    """Which; without it the newest."""
    part: str | None = None
    """Only this part of the state, e.g. model, with the keys of its state_dict."""
    force: bool = False
    """Replace the target if there is one."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Import:
    """Save what another format holds as a committed step; nothing that a pickle names is run."""

    source: Source
    """A local path: a folder for dcp, else a file."""
    url: Url
    """The folder or fsspec URL for checkpoints; made if it is not there."""
    format: Literal["safetensors", "dcp", "torch"]
    """safetensors; dcp: torch.distributed.checkpoint; torch: a file of torch.save."""
    step: int = 0
    """The number the step gets; there must be no such step yet."""
    part: str | None = None
    """Put what is read below this key of the state, e.g. model."""
    json: bool = False
    """Print JSON."""


Action = (
    Annotated[Ls, tyro.conf.subcommand("ls")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Diff, tyro.conf.subcommand("diff")]
    | Annotated[Prune, tyro.conf.subcommand("prune")]
    | Annotated[Memory, tyro.conf.subcommand("memory")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Import, tyro.conf.subcommand("import")]
)
