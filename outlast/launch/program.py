"""What a user wants run: a script, a module or any other program, as on torchrun's command line."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Literal

from outlast.errors import ConfigError

ARCHIVE = b"PK\x03\x04"
"""How a zip archive begins; Python runs those that have a ``__main__.py``."""
PYTHON = "PYTHON_EXEC"
"""The interpreter of the ranks, as torchrun reads it; by default the launcher's."""
INTERPRETER_S = 60.0
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

    def command(self, *, watched: bool = True) -> tuple[str, ...]:
        """What each rank runs. A watched Python program starts by :mod:`outlast.launch.runner`."""
        if self.kind == "program":
            return (self.target, *self.arguments)
        python = (os.environ.get(PYTHON) or sys.executable, *(("-m", "outlast.launch.runner") if watched else ("-u",)))
        flag = ("-m",) if self.kind == "module" else ()
        return (*python, *flag, self.target, *self.arguments)

    def check(self) -> None:
        """Find out before any process is started what would fail in every rank.

        Raises:
            ConfigError: the script is not there, is a directory or not valid Python; there is no such module, or it
                cannot be run; the program cannot be executed.
        """
        if self.kind != "program" and os.environ.get(PYTHON):
            _check_interpreter(os.environ[PYTHON])
        {"script": self._check_script, "module": self._check_module, "program": self._check_program}[self.kind]()

    def _check_script(self) -> None:
        if not self.target.strip():
            raise ConfigError("the script's name is empty", "is the variable set that should hold it?")
        path = Path(self.target)
        try:
            if path.is_dir():
                path = path / "__main__.py"
            if path.exists() and not path.is_file():  # a pipe gives what it holds only once
                raise ConfigError(
                    f"{path} is no file: each rank reads the script, and again after a restart", "write it into a file"
                )
            source = path.read_bytes()
        except FileNotFoundError as error:
            if path.parent.is_dir() and path != Path(self.target):
                raise ConfigError(
                    f"{path.parent} is a directory without a __main__.py",
                    "name the script in it, or use -m MODULE for a package",
                ) from error
            near = f"; as a module: -m {self.target}" if find_module(self.target) else ""
            raise ConfigError(f"no script at {path}", f"give its path, relative to {Path.cwd()}{near}") from error
        except OSError as error:
            raise ConfigError(
                f"script {path} cannot be read: {error.strerror}", "give the user who runs this the right to read it"
            ) from error
        if not source.startswith(ARCHIVE):
            _check_python(path, source)

    def _check_module(self) -> None:
        spec = find_module(self.target)
        if spec is None:
            raise ConfigError(
                f"no module named {self.target!r}", "a module is found in the working directory and in sys.path"
            )
        if spec.submodule_search_locations is not None:
            spec = find_module(f"{self.target}.__main__")
            if spec is None:
                raise ConfigError(
                    f"{self.target} is a package without a __main__ module, so it cannot be run",
                    f"name a module in it: -m {self.target}.MODULE",
                )
        if spec.origin is not None and spec.origin.endswith(".py") and Path(spec.origin).is_file():
            try:
                source = Path(spec.origin).read_bytes()
            except OSError as error:
                raise ConfigError(
                    f"module {self.target}, at {spec.origin}, cannot be read: {error.strerror}",
                    "give the user who runs this the right to read it",
                ) from error
            _check_python(Path(spec.origin), source)

    def _check_program(self) -> None:
        if shutil.which(self.target) is not None:
            return
        path = Path(self.target)
        try:
            if path.is_dir():
                raise ConfigError(f"{self.target} cannot be run: it is a directory", "name the program in it")
            path.stat()
        except PermissionError as error:
            raise ConfigError(f"{self.target} cannot be run: {error.strerror}") from error
        except OSError:  # it is not there
            pass
        why = "it is not executable" if path.is_file() else "there is no such program in PATH"
        raise ConfigError(f"{self.target} cannot be run: {why}", "give a path, or make it executable: chmod +x")


def _check_interpreter(path: str) -> None:
    code = "import outlast.launch.runner"
    try:
        done = subprocess.run([path, "-c", code], capture_output=True, text=True, timeout=INTERPRETER_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{PYTHON}={path} cannot be run: {error}", f"unset {PYTHON}") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ConfigError(
            f"{PYTHON}={path} cannot start watched programs: {last}",
            f"install outlast for that interpreter, or unset {PYTHON}",
        )


def _check_python(path: Path, source: bytes) -> None:
    try:
        compile(source, str(path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise ConfigError(
            f"{path}{where} is not valid Python: {error.msg if isinstance(error, SyntaxError) else error}",
            "for a program that is not Python: --no-python PROGRAM; for settings of outlast's own trainer the "
            "file's name ends in .toml",
        ) from error


def find_module(name: str) -> ModuleSpec | None:
    """Where ``python -m`` would find the module, from the working directory; None if it would not.

    No package is imported for it: its code belongs into the ranks.
    """
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        return None
    here = os.getcwd()
    added = here not in sys.path
    importlib.invalidate_caches()
    if added:
        sys.path.insert(0, here)
    try:
        spec = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError):  # a module that is loaded, and does not say from where
        return None
    finally:
        if added:
            sys.path.remove(here)
    for depth in range(2, len(parts) + 1):
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = _find_in(list(spec.submodule_search_locations), ".".join(parts[:depth]))
    return spec


def _find_in(folders: list[str], name: str) -> ModuleSpec | None:
    """A module of a package; as importlib does it, which for a namespace package imports what is above it."""
    parts: list[str] = []
    for folder in folders:
        finder = pkgutil.get_importer(folder)
        spec = finder.find_spec(name) if finder is not None else None
        if spec is not None and spec.loader is not None:
            return spec
        if spec is not None:
            parts += spec.submodule_search_locations or ()
    if not parts:
        return None
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = parts
    return spec
