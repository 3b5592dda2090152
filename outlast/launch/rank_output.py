"""Where the ranks' output goes: torchrun's --redirects, --tee and --local-ranks-filter, or what stands for them."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

from torch.distributed.elastic.multiprocessing import LogsSpecs, Std
from torch.distributed.elastic.multiprocessing.api import LogsDest, to_map

from outlast.checkpoint.ownership import JOB
from outlast.launch.flags import LaunchFlags
from outlast.launch.imports import IMPORTS, WITHIN_S
from outlast.launch.orphans import MARK
from outlast.launch.place import GENERATION


class RankOutput(LogsSpecs):
    """Rank 0 writes to the launcher's stdout and stderr. The other ranks' stdout goes to a file; their stderr goes to a
    file and, with the rank before each line, to the launcher's stderr. Flags say otherwise.

    Files are ``ROOT/UTC_HOST/restart_N/rank_R.out``, ``.err`` and ``.error.json`` (torchelastic's error file).

    Args:
        root: folder of all launchers' files.
        host: this node's name.
        flags: what goes to files, and what is shown.
    """

    def __init__(self, root: Path, host: str, flags: LaunchFlags | None = None) -> None:
        # The process id separates launchers that start within one second on one host.
        self.folder = root / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}_{host}_{os.getpid()}"
        super().__init__(log_dir=str(self.folder))
        self._flags = flags or LaunchFlags()
        self.generation = 0
        """The generation of the ranks that start next; the agent sets it."""
        self.mark = secrets.token_hex(8)
        """Marks the processes of this launcher's ranks, whatever they start; nothing else has it."""
        self.job = ""
        """Names the job to its ranks, the same after each restart and on all nodes; the agent sets it."""
        self.imports_within_s: float | None = None
        """As ``imports.WITHIN_S``: each rank leaves a file that says what it has imported. None: none does."""
        self.added: dict[str, str] = {}
        """More variables for the ranks that start next; the agent sets them."""

    @property
    def root_log_dir(self) -> str:
        """The folder of this launcher's files."""
        return str(self.folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Destinations by local rank; also sets each rank's error file, job and generation in its environment."""
        folder = self.folder / f"restart_{self.generation}"
        folder.mkdir(parents=True)
        out = LogsDest()
        out.filtered_stdout = str(folder / "filtered_stdout.log")
        out.filtered_stderr = str(folder / "filtered_stderr.log")
        for local_rank, environ in envs.items():
            rank = int(environ["RANK"])
            stem = folder / f"rank_{rank:05d}"
            filed, shown = self._streams(local_rank, rank, len(envs))
            out.stdouts[local_rank] = f"{stem}.out" if Std.OUT in filed else ""
            out.stderrs[local_rank] = f"{stem}.err" if Std.ERR in filed else ""
            if Std.OUT in filed & shown:
                out.tee_stdouts[local_rank] = f"{stem}.out"
            if Std.ERR in filed & shown:
                out.tee_stderrs[local_rank] = f"{stem}.err"
            out.error_files[local_rank] = f"{stem}.error.json"
            environ[GENERATION] = str(self.generation)
            environ[JOB] = self.job
            environ.update(self.added)
            environ[MARK] = self.mark
            if self.imports_within_s is not None:
                environ[IMPORTS], environ[WITHIN_S] = f"{stem}.imports.json", str(self.imports_within_s)
            environ["TORCHELASTIC_ERROR_FILE"] = f"{stem}.error.json"
        return out

    def _streams(self, local_rank: int, rank: int, ranks: int) -> tuple[Std, Std]:
        """Which streams of a rank go to files, and which of these are shown too; others go to the console."""
        flags = self._flags
        chosen = flags.local_ranks_filter
        if chosen and local_rank not in map(int, chosen.split(",")):
            return Std.ALL, Std.NONE  # torchrun gives away what it does not show, and with it a rank's last words
        if flags.redirects or flags.tee:
            tee, redirects = (
                to_map(Std.from_str(one or "0"), ranks)[local_rank] for one in (flags.tee, flags.redirects)
            )
            return tee | redirects, tee
        if chosen:
            return Std.ALL, Std.ALL
        return (Std.NONE, Std.NONE) if rank == 0 else (Std.ALL, Std.ERR)
