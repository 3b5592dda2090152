"""What a user wants run: a script, a module or any other program, as on torchrun's command line."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from outlast.errors import ConfigError

ARCHIVE = b"PK\x03\x04"
"""How a zip archive begins; Python runs those that have a ``__main__.py``."""
Kind = Literal["script", "module", "program"]


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program and its arguments.

    Raises:
        ConfigError: by :meth:`check`, never by the constructor.
    """

    kind: Kind
    """``script``: a Python file; ``module``: as ``python -m``; ``program``: anything that can be executed."""
    target: str
    arguments: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """A short name: the script's without its ending, or the module's."""
        return self.target if self.kind == "module" else Path(self.target).stem

    @property
    def command(self) -> tuple[str, ...]:
        """What each rank runs. Python programs start through :mod:`outlast.launch.runner`."""
        if self.kind == "program":
            return (self.target, *self.arguments)
        flag = ("-m",) if self.kind == "module" else ()
        return (sys.executable, "-m", "outlast.launch.runner", *flag, self.target, *self.arguments)

    def check(self) -> None:
        """Find out before any process is started what would fail in every rank.

        Raises:
            ConfigError: the script is not there, is a directory or not valid Python; there is no such module, or it
                cannot be run; the program cannot be executed.
        """
        {"script": self._check_script, "module": self._check_module, "program": self._check_program}[self.kind]()

    def _check_script(self) -> None:
        path = Path(self.target)
        if path.is_dir():
            if not (path / "__main__.py").is_file():
                raise ConfigError(
                    f"{path} is a directory without a __main__.py",
                    "name the script in it, or use -m MODULE for a package",
                )
            path = path / "__main__.py"
        try:
            source = path.read_bytes()
        except FileNotFoundError as error:
            near = f"; as a module: -m {self.target}" if importlib_finds(self.target) else ""
            raise ConfigError(f"no script at {path}", f"give its path, relative to {Path.cwd()}{near}") from error
        except OSError as error:
            raise ConfigError(f"script {path} cannot be read: {error.strerror}") from error
        if source.startswith(ARCHIVE):
            return
        try:
            compile(source, str(path), "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            where = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
            raise ConfigError(
                f"{path}{where} is not valid Python: {error.msg if isinstance(error, SyntaxError) else error}",
                "for a program that is not Python: --no-python PROGRAM; for settings of outlast's own trainer the "
                "file's name ends in .toml",
            ) from error

    def _check_module(self) -> None:
        if not importlib_finds(self.target):
            raise ConfigError(
                f"no module named {self.target!r}", "a module is found in the working directory and in sys.path"
            )
        spec = importlib.util.find_spec(self.target)
        if spec is not None and spec.submodule_search_locations and not importlib_finds(f"{self.target}.__main__"):
            raise ConfigError(
                f"{self.target} is a package without a __main__ module, so it cannot be run",
                f"name a module in it: -m {self.target}.MODULE",
            )

    def _check_program(self) -> None:
        if shutil.which(self.target) is None:
            path = Path(self.target)
            why = "it is not executable" if path.is_file() else "there is no such program in PATH"
            raise ConfigError(f"{self.target} cannot be run: {why}", "give a path, or make it executable: chmod +x")


def importlib_finds(module: str) -> bool:
    """Whether ``python -m`` would find the module, from the working directory."""
    if not all(part.isidentifier() for part in module.split(".")):
        return False
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError, AttributeError):  # a parent that is not there, is no package, or fails
        return False
    finally:
        if added:
            sys.path.remove(here)
