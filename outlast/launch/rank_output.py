"""Where the ranks' output goes."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

from torch.distributed.elastic.multiprocessing import LogsSpecs
from torch.distributed.elastic.multiprocessing.api import LogsDest

from outlast.checkpoint.ownership import JOB
from outlast.launch.orphans import MARK
from outlast.launch.place import GENERATION


class RankOutput(LogsSpecs):
    """Rank 0 writes to the launcher's stdout and stderr. The other ranks' stdout goes to a file; their stderr goes to a
    file and, with the rank before each line, to the launcher's stderr.

    Files are ``ROOT/UTC_HOST/restart_N/rank_R.out``, ``.err`` and ``.error.json`` (torchelastic's error file).
    """

    def __init__(self, root: Path, host: str) -> None:
        # The process id separates launchers that start within one second on one host.
        self.folder = root / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}_{host}_{os.getpid()}"
        super().__init__(log_dir=str(self.folder))
        self.generation = 0
        """The generation of the ranks that start next; the agent sets it."""
        self.mark = secrets.token_hex(8)
        """Marks the processes of this launcher's ranks, whatever they start; nothing else has it."""
        self.job = ""
        """Names the job to its ranks, the same after each restart and on all nodes; the agent sets it."""
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
        for local_rank, environ in envs.items():
            rank = int(environ["RANK"])
            stem = folder / f"rank_{rank:05d}"
            out.stdouts[local_rank] = "" if rank == 0 else f"{stem}.out"
            out.stderrs[local_rank] = "" if rank == 0 else f"{stem}.err"
            if rank != 0:
                out.tee_stderrs[local_rank] = f"{stem}.err"
            out.error_files[local_rank] = f"{stem}.error.json"
            environ[GENERATION] = str(self.generation)
            environ[JOB] = self.job
            environ.update(self.added)
            environ[MARK] = self.mark
            environ["TORCHELASTIC_ERROR_FILE"] = f"{stem}.error.json"
        return out
