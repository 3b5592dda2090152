"""``killed_at.py STEP,STEP,… SCRIPT STEPS …``: an example whose start n is killed at its step, on rank n modulo 2."""

import os
import signal
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

kills, script, steps, *words = sys.argv[1:]
spec = spec_from_file_location("example", script)
assert spec is not None
assert spec.loader is not None
example = module_from_spec(spec)
spec.loader.exec_module(example)
example.STEPS = int(steps)
start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
batch = example.batch


def batch_or_end(step, rank):
    """The step's batch, unless it is the one in which this rank is killed."""
    if start < len(kills.split(",")) and step == int(kills.split(",")[start]) and rank == start % 2:
        saved = Path(words[0], f"step_{step // 20 * 20:08d}", "commit.json")
        given_up_s = time.monotonic() + 60
        while not saved.exists() and time.monotonic() < given_up_s:  # from which the next start goes on
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(step, rank)


example.batch = batch_or_end
example.main(*words)
