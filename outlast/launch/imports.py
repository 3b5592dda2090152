"""What a program imports: written down in a rank, and imported again by a standby.

Only modules of installed packages, of the standard library and of outlast are written down. The user's own modules may
do anything when they are imported, so a standby imports none of them unless ``launch.standby_modules`` names it.

A program may set environment variables before it imports a package that reads them. So what differs in the environment
when a package is first imported is written down too, and holds while a standby imports that package.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import site
import sys
import sysconfig
import threading
from collections.abc import Iterator, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

IMPORTS = "OUTLAST_STANDBY_IMPORTS"
"""In the environment of ranks: the file that says what they have imported."""
WITHIN_S = "OUTLAST_STANDBY_IMPORTS_WITHIN_S"
"""... and for how many seconds nothing more is imported, before it says so where no steps are seen."""
WRITTEN_AFTER_STEPS = 3
"""By then a program has imported what its steps need."""

Changes = dict[str, str | None]
"""Environment variables and their values; None for one that is not set."""


class ImportRecord(MetaPathFinder):
    """Writes down what this process imports, in its first steps.

    Args:
        path: the file.
        within_s: if there are no steps, it is written when so long nothing more has been imported.
    """

    def __init__(self, path: Path, within_s: float) -> None:
        self._path = path
        self._pid = os.getpid()
        self._began = dict(os.environ)
        self._changes: dict[str, Changes] = {}
        self._steps = 0
        self._within_s = within_s
        self._lock = threading.Lock()
        self._known = 0
        self._timer: threading.Timer | None = None

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> ImportRecord | None:
        """As the launcher wants it by these variables; None if it does not."""
        return cls(Path(environ[IMPORTS]), float(environ[WITHIN_S])) if IMPORTS in environ else None

    def install(self) -> None:
        """Begin to look at imports."""
        sys.meta_path.insert(0, self)
        self._wait()

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """Always None: this only looks at the environment when a package's first module is imported."""
        if "." not in fullname and fullname not in sys.stdlib_module_names and fullname not in self._changes:
            self._changes[fullname] = changes(self._began, dict(os.environ))
        return None

    def after_step(self) -> None:
        """The program has taken a step."""
        self._steps += 1
        if self._steps == WRITTEN_AFTER_STEPS:
            self.close()
            self._write()

    def close(self) -> None:
        """Look no more."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        if self._timer is not None:
            self._timer.cancel()

    def _wait(self) -> None:
        self._timer = threading.Timer(self._within_s, self._write_if_quiet)
        self._timer.daemon = True
        self._timer.start()

    def _write_if_quiet(self) -> None:
        """Without steps: write it unless the program has imported more since the look before."""
        before, self._known = self._known, len(sys.modules)
        if self not in sys.meta_path:
            return
        if self._known == before:
            self._write()
        else:
            self._wait()

    def _write(self) -> None:
        """Write the file, unless this process was forked from the one that looks.

        A file that cannot be written is left out: without it there is no standby, which the launcher tells.
        """
        if os.getpid() != self._pid:
            return
        names = installed(dict(sys.modules))
        roots = {name.partition(".")[0] for name in names}
        text = json.dumps(
            {"modules": names, "environ": {root: one for root, one in self._changes.items() if one and root in roots}}
        )
        temporary = self._path.with_suffix(".tmp")
        with self._lock, contextlib.suppress(OSError):
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self._path)


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> Changes:
    """What has changed in an environment."""
    if before == after:
        return {}
    found: Changes = {key: value for key, value in after.items() if before.get(key) != value}
    found.update({key: None for key in before if key not in after})
    return found


def apply(environ: Changes) -> None:
    """Make these changes in this process's environment."""
    for key, value in environ.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value


def installed(modules: Mapping[str, ModuleType]) -> list[str]:
    """The names of those of installed packages, of the standard library and of outlast, in the order of import."""
    packages = {sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")}
    packages |= {*site.getsitepackages(), site.getusersitepackages()}
    folders = tuple(f"{Path(one).resolve()}{os.sep}" for one in packages) + tuple(f"{one}{os.sep}" for one in packages)
    found = []
    for name, module in modules.items():
        spec = getattr(module, "__spec__", None)
        if name == "__main__" or spec is None or spec.name != name or not isinstance(spec.origin, str):
            continue
        if name.partition(".")[0] == "outlast" or spec.origin.startswith(folders):
            found.append(name)
    return found


def import_again(modules: Sequence[str], environ: Mapping[str, Changes]) -> tuple[Changes, dict[str, str]]:
    """Import modules as a rank has.

    Args:
        modules: their names, in the rank's order.
        environ: by package, what its importer had changed in the environment.

    Returns:
        What the imports themselves have changed in the environment, and by module why it cannot be imported.
    """
    made: Changes = {}
    failed: dict[str, str] = {}
    for name in modules:
        if name in sys.modules:
            continue
        with _changed(environ.get(name.partition(".")[0], {})):
            before = dict(os.environ)
            try:
                importlib.import_module(name)
            except Exception as error:  # whatever a package raises: the rank itself, or nobody, will see it again
                failed[name] = f"{type(error).__name__}: {error}"
            made.update(changes(before, dict(os.environ)))
    return made, failed


@contextlib.contextmanager
def _changed(environ: Changes) -> Iterator[None]:
    before: Changes = {key: os.environ.get(key) for key in environ}
    apply(environ)
    try:
        yield
    finally:
        apply(before)
