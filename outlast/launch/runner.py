"""Runs a Python program as a watched rank: ``python -m outlast.launch.runner [-m] TARGET ARGUMENTS…``.

``outlast launch`` starts scripts and modules through it. The program runs as ``__main__``, with its own ``sys.argv``,
``sys.path``, working directory and tracebacks, and need not know of it: what watches is a thread, torch's own flight
recorder, a hook that torch calls after an optimizer's step, and what tells of delays (``live.step_delays``). torch is
not imported unless the program does so.
"""

from __future__ import annotations

import faulthandler
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from outlast.diagnostics.live import point_to_point
from outlast.diagnostics.live.flight import flight_counts
from outlast.diagnostics.live.patches import AfterImport
from outlast.diagnostics.live.program_watch import ProgramWatch
from outlast.errors import OutlastError
from outlast.events import RunEnded, RunStarted
from outlast.launch.attempt import Attempt
from outlast.launch.failures import NO_RESTART_STATUS
from outlast.launch.imports import ImportRecord
from outlast.launch.lasting_output import make_output_last, open_lasting
from outlast.launch.place import GENERATION
from outlast.launch.program import ARCHIVE
from outlast.launch.rank_records import RankRecords

RUN_DIR = "OUTLAST_RUN_DIR"
"""In the environment of ranks that run somebody's program: the run's directory,"""
ATTEMPT = "OUTLAST_ATTEMPT"
"""the number of the attempt,"""
STEPS_TAKEN = "OUTLAST_STEPS_TAKEN"
"""how many steps the run had taken before this start,"""
LOOK_EVERY_S = "OUTLAST_LOOK_EVERY_S"
"""and the seconds between two looks at its collectives, or :data:`AUTO`."""
AUTO = "auto"
USAGE_STATUS = 2
"""Exit status of a program that does not understand its arguments: argparse, click and others agree on it."""

_OPTIMIZERS = "torch.optim.optimizer"


class Runner:
    """What is installed around a program.

    Args:
        environ: torchrun's variables and those above.

    Raises:
        DiagnosticsError: shared memory cannot be used.
        KeyError: a variable is missing; ``outlast launch`` sets them.
    """

    def __init__(self, environ: dict[str, str] | os._Environ[str]) -> None:
        self.rank, self.world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
        self.attempt = Attempt(Path(environ[RUN_DIR]), int(environ[ATTEMPT]))
        self.attempt.make_folders()
        self._log = open_lasting(self.attempt.log_path(self.rank))
        faulthandler.register(signal.SIGUSR1, file=self._log, all_threads=True)
        self._generation = int(environ.get(GENERATION, "0"))
        records = RankRecords(self.attempt, self.rank, self._generation)
        self._events, self._heartbeat = records.events, records.heartbeat
        self._taken = taken = int(environ.get(STEPS_TAKEN, "0"))
        every = environ.get(LOOK_EVERY_S, AUTO)
        every_s = None if every == AUTO else float(every)
        self._watch = ProgramWatch(
            records.heartbeat, records.recorder, records.events, first_step=taken, every_s=every_s
        )
        self._imports = ImportRecord.of(environ)
        self._events.write(RunStarted(attempt=self.attempt.number, world_size=self.world_size, first_step=taken + 1))

    def run(self, start: Callable[[], None]) -> int:
        """Run the program; returns its exit status. Its own traceback is printed, without the runner's frames."""
        if self._imports is not None:
            self._imports.install()
        AfterImport(_OPTIMIZERS, self._hook_optimizers).install()
        AfterImport(point_to_point.MODULE, point_to_point.install).install()
        self._watch.start()
        ok, reason, status = True, "", 0
        try:
            start()
        except SystemExit as end:
            ok, reason, status = _meaning(end.code)
            if not isinstance(end.code, int) and not ok:
                print(end.code, file=sys.stderr)
                print(end.code, file=self._log)
            if end.code == USAGE_STATUS and self._never_began():
                status = NO_RESTART_STATUS
        except BaseException as error:
            ok, reason, status = False, f"{type(error).__name__}: {error}", 1
            error.__traceback__ = _without_own(error)
            self._tell(error)
            if isinstance(error, KeyboardInterrupt):
                status = 130
            elif self._would_fail_again(error):
                status = NO_RESTART_STATUS
        finally:
            self._end(ok, reason)
        return status

    def _would_fail_again(self, error: BaseException) -> bool:
        if isinstance(error, OutlastError):
            return not error.restartable
        return isinstance(error, SyntaxError | ImportError | UnreadableScript) and self._never_began()

    def _never_began(self) -> bool:
        """Whether this is the job's first start, and nothing has been done in it: the same would come of another one.

        In a later start it would not: what was there once may come back, such as a file on storage that is away.
        """
        begun = self._watch.step > self._taken or any(count.enqueued for count in flight_counts().values())
        return self._generation == 0 and not begun

    def _hook_optimizers(self, module: ModuleType) -> None:
        def after_step(optimizer: object, args: Any, kwargs: Any) -> None:
            self._watch.on_optimizer_step(optimizer)
            if self._imports is not None:
                self._imports.after_step()

        module.register_optimizer_step_post_hook(after_step)

    def _tell(self, error: BaseException) -> None:
        """Print the traceback, and leave it where the launcher looks for a rank's last words."""
        sys.excepthook(type(error), error, error.__traceback__)
        traceback.print_exception(error, file=self._log)
        self._log.flush()

    def _end(self, ok: bool, reason: str) -> None:
        self._watch.close()
        if self._imports is not None:
            self._imports.close()
        if not ok:
            self._watch.keep_newest()
        self._heartbeat.beat("finish", self._watch.step)
        self._events.write(RunEnded(step=self._watch.step, ok=ok, reason=reason))
        self._events.close()
        self._log.flush()


class UnreadableScript(Exception):
    """The script is not there any more, or not readable here."""


def _meaning(code: object) -> tuple[bool, str, int]:
    """What ``sys.exit(code)`` means: whether all is well, in words, and as a status."""
    if code is None or code == 0:
        return True, "", 0
    if isinstance(code, int):
        return False, f"exited with status {code}", code
    return False, str(code), 1


def _without_own(error: BaseException) -> TracebackType | None:
    """The traceback from the program's first frame on. Without one, what is wrong may be the program's text or name."""
    start = tb = error.__traceback__
    while start is not None and start.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
        start = start.tb_next
    return start if start is not None or isinstance(error, SyntaxError | ImportError | UnreadableScript) else tb


def first_path(arguments: list[str]) -> str:
    """``sys.path[0]`` of a program that is run with these arguments; archives and folders add their own to it."""
    is_module = arguments[0] == "-m"
    script = Path(arguments[is_module])
    return str(script.resolve().parent) if not is_module and script.is_file() else os.getcwd()


def _run_script(path: str) -> None:
    """Execute a file, or the ``__main__.py`` of a folder or archive, as ``__main__``, as the interpreter would."""
    try:
        source = None if Path(path).is_dir() else Path(path).read_bytes()
    except OSError as error:  # the launcher has seen it
        raise UnreadableScript(f"can't open file {path!r} in {os.getcwd()}: {error.strerror}") from None
    if source is None or source.startswith(ARCHIVE):
        runpy.run_path(str(Path(path).absolute()), run_name="__main__")
        return
    sys.path[0] = first_path([path])
    code = compile(source, path, "exec", dont_inherit=True)
    main = ModuleType("__main__")
    vars(main).update(__file__=path, __builtins__=__builtins__, __spec__=None, __cached__=None)
    sys.modules["__main__"] = main
    exec(code, vars(main))


def _run_module(name: str) -> None:
    sys.path[0] = os.getcwd()
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def main(arguments: list[str]) -> int:
    """Install what watches, then run the program."""
    make_output_last()
    is_module = arguments[0] == "-m"
    target, *rest = arguments[is_module:]
    runner = Runner(os.environ)
    sys.argv = [target, *rest]
    start = _run_module if is_module else _run_script
    return runner.run(lambda: start(target))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
