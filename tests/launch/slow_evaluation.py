"""``slow_evaluation.py SECONDS CONFIG …``: the trainer, with one held-out batch that takes that long on all ranks."""

import sys
import time

from outlast import Session
from outlast.trainer.main import main
from outlast.trainer.run import Run

SECONDS = float(sys.argv[1])
evaluate_at_once = Run.evaluate


def evaluate(run: Run, session: Session, step: int) -> None:
    if step:
        with session.evaluating(changes=False):
            time.sleep(SECONDS)
    evaluate_at_once(run, session, step)


Run.evaluate = evaluate  # type: ignore[method-assign]
sys.exit(main(sys.argv[2:]))
