"""``outlast ckpt export|import``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from outlast.cli.ckpt.output import Action, Url, print_json, print_line, size
from outlast.errors import ConfigError

if TYPE_CHECKING:
    import torch

Target = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TARGET")]
Source = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]


@dataclass(frozen=True, kw_only=True)
class Export(Action):
    """Write a step's replicated state in another format; every byte is verified as it is read."""

    url: Url
    """The folder or fsspec URL of a run's checkpoints."""
    target: Target
    """A local path: a folder for dcp, else a file."""
    format: Literal["safetensors", "dcp", "torch"]
    """safetensors; dcp: torch.distributed.checkpoint; torch: a file of torch.save."""
    step: int | None = None
    """The step; without it, the newest."""
    part: str | None = None
    """Only this part of the state, e.g. model, with the keys of its state_dict."""
    parts: tuple[str, ...] | None = None
    """Only these parts, each under its name."""
    rename: tuple[str, ...] = ()
    """OLD=NEW: names of tensors in the step, keys joined by /, or beginnings of names; or the word unwrapped, for
    names without what torch.compile, DDP, FSDP and activation checkpointing put into them."""
    cast: str | None = None
    """A type that all floating-point tensors are converted to, e.g. bfloat16; too large numbers are an error."""
    strict: bool = True
    """Refuse a state that the format cannot hold whole; with --no-strict that is left out, and named."""
    force: bool = False
    """Replace the target if it exists."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Export it; after an error nothing of it is left."""
        from outlast.checkpoint import convert

        done = convert.export_step(
            self.url,
            self.target,
            self.format,
            step=self.step,
            part=self.part,
            parts=self.parts,
            strict=self.strict,
            rename=_rename(self.rename),
            cast=_dtype(self.cast),
            force=self.force,
        )
        if self.json:
            print_json(dataclasses.asdict(done))
            return 0
        console = Console()
        what = f"{done.tensors} tensors and {done.values} values"
        print_line(console, f"written: {done.target} ({done.format}): {what} of {done.url}, {size(done.size_bytes)}")
        for name in done.left_out:
            print_line(console, f"left out: {name}: {done.format} cannot hold it")
        return 0


@dataclass(frozen=True, kw_only=True)
class Import(Action):
    """Save the contents of another format as a committed step. Code named by a pickle is never run."""

    source: Source
    """A local path: a folder for dcp, else a file, or a folder (or its index) as save_pretrained writes it."""
    url: Url
    """The folder or fsspec URL for checkpoints; created if it does not exist."""
    format: Literal["safetensors", "dcp", "torch"]
    """safetensors; dcp: torch.distributed.checkpoint; torch: a file of torch.save."""
    step: int = 0
    """The new step's number; it must not exist yet."""
    part: str | None = None
    """Put the contents under this key of the state, e.g. model."""
    parts: tuple[str, ...] | None = None
    """Take only these top-level keys of the source."""
    rename: tuple[str, ...] = ()
    """OLD=NEW: names of tensors in the source, keys joined by /, or beginnings of names; or the word unwrapped, for
    names without what torch.compile, DDP, FSDP and activation checkpointing put into them."""
    cast: str | None = None
    """A type that all floating-point tensors are converted to, e.g. bfloat16; too large numbers are an error."""
    strict: bool = True
    """Refuse a source that a step cannot hold whole; with --no-strict that is left out, and named."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Import it; after an error there is no such step."""
        from outlast.checkpoint import convert

        done = convert.import_step(
            self.source,
            self.url,
            self.format,
            step=self.step,
            part=self.part,
            parts=self.parts,
            strict=self.strict,
            rename=_rename(self.rename),
            cast=_dtype(self.cast),
        )
        if self.json:
            print_json(dataclasses.asdict(done))
            return 0
        what = f"{done.tensors} tensors and {done.values} values of {done.source}"
        print_line(Console(), f"saved: step {done.step} at {done.url}: {what}, {size(done.size_bytes)}")
        for name in done.left_out:
            print_line(Console(), f"left out: {name}: a step cannot hold it")
        return 0


def _rename(words: tuple[str, ...]) -> dict[str, str] | Literal["unwrapped"] | None:
    if words == ("unwrapped",):
        return "unwrapped"
    names: dict[str, str] = {}
    for word in words:
        old, equals, new = word.partition("=")
        if not equals or not old or old in names:
            raise ConfigError(f"--rename {word!r}", "pass OLD=NEW, each OLD once, or the one word unwrapped")
        names[old] = new
    return names or None


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    from outlast.checkpoint.format.dtypes import dtype_of

    dtype = dtype_of(name)
    if dtype is None or not dtype.is_floating_point:
        raise ConfigError(f"--cast {name}", "pass a floating-point type, e.g. float32, bfloat16 or float16")
    return dtype
