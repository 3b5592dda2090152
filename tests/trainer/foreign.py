"""A model of somebody else's, transformers' GPT-2, trained from the ready-to-run config, killed and resumed."""

from __future__ import annotations

from pathlib import Path

from tests.helpers import arrays, events, outlast, steps_saved, values

CONFIG = Path(__file__).parents[2] / "configs" / "gpt2.toml"
SMALL = ["n_layer=2", "n_head=2", "n_embd=32", "n_positions=32"]
WORDS = [
    *(f"--model.arguments.config.arguments.{word}" for word in SMALL),
    *["--model.context", "32", "--data.files", "{stdlib}/*.py", "--data.batch-size", "4", "--trainer.steps", "6"],
    *["--checkpoint.every-steps", "2", "--checkpoint.keep-last", "0", "--checkpoint.pack-below-kb", "0"],
    *["--trainer.eval-every-steps", "0", "--trainer.eval-batches", "1", "--optim.warmup-steps", "2"],
]
KILLED = """
import os, signal
from transformers import GPT2LMHeadModel

class Killed(GPT2LMHeadModel):
    calls = 0
    def forward(self, *args, **kwargs):
        Killed.calls += self.training
        if Killed.calls == {call} and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(*args, **kwargs)
"""


def train(folder: Path, name: str, *words: str, ranks: int = 2, check: int | None = 0) -> str:
    """Train ``configs/gpt2.toml``, made small, in ``folder / name``; what was printed."""
    config = folder / "gpt2.toml"
    config.write_text(CONFIG.read_text())
    flags = ["--nproc-per-node", str(ranks), "--run.dir", str(folder / name)]
    done = outlast("launch", config, *flags, *WORDS, *words, check=check)
    return done.stdout + done.stderr


def assert_ends_the_same_when_killed(folder: Path, *words: str, call: int = 6, before: str = "") -> None:
    """A run whose rank 1 is killed in its ``call``-th forward goes on, and ends as one that was not killed.

    By then the step 4 was saved, so step 2 is durable.
    """
    (folder / "killed_gpt2.py").write_text(before + KILLED.format(call=call))
    named = ["--model.factory", "killed_gpt2:Killed", *words]
    train(folder, "killed", *named)
    (folder / "killed_gpt2.py").write_text(before + KILLED.format(call=0))
    train(folder, "straight", *named)
    killed, straight = folder / "killed", folder / "straight"
    first_steps = [record["first_step"] for record in events(killed, "run_started")]
    assert first_steps in ([1, 1, 3, 3], [1, 1, 5, 5])
    assert steps_saved(killed) == steps_saved(straight) == [2, 4, 6]
    one, other = (arrays(run / "checkpoints" / "step_00000006") for run in (killed, straight))
    assert one.keys() == other.keys()
    assert len(one) > 10
    for name in one:
        assert one[name].tobytes() == other[name].tobytes(), name
    mine, theirs = (values(run / "checkpoints" / "step_00000006") for run in (killed, straight))
    mine.pop("."), theirs.pop(".")  # the checkpoint's own: when and by which start it was written
    assert mine == theirs
