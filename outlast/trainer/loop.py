"""The training loop, on one screen."""

from __future__ import annotations

from outlast.events import StepDone
from outlast.session import Session
from outlast.trainer.batches import size_of
from outlast.trainer.run import Run


def train(session: Session, run: Run) -> None:
    """Take every step that is left, or until a notice ends the run at a checkpoint.

    Collective: all ranks call it with runs that differ in their rank only. When a peer fails, the step's collectives
    raise here, no update is made from a partial sum, and a restart goes on from the newest committed checkpoint.
    """

    def after_step(done: StepDone) -> None:
        run.progress.step(done)
        if run.evaluation_due(done.step) and not session.ending:
            run.evaluate(session, done.step)

    steps = session.steps(run.config.trainer.steps, after_step)
    if session.done_step == 0 and not session.ending:
        run.evaluate(session, step=0)
    for step in steps:
        with session.loading():
            batches = run.batches(step)

        loss = run.forward_backward(step, batches)  # gradients are exchanged while backward runs
        session.ask_notice()  # answered after the update
        session.wait_copied()  # the update changes what the last snapshot may still be copying
        norms = run.update(step)
        session.log(loss=loss, tokens=sum(map(size_of, batches)), **norms)
