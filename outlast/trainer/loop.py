"""The training loop, on one screen."""

from __future__ import annotations

from outlast.events import RunEnded, StepDone
from outlast.trainer.batches import size_of
from outlast.trainer.run import Run
from outlast.trainer.step_timer import StepTimer


def train(run: Run) -> None:
    """Take every step from ``run.first_step`` to ``run.last_step``, or until a notice ends the run at a checkpoint.

    Collective: all ranks call it with runs that differ in their rank only. When a peer fails, the step's collectives
    raise here, no update is made from a partial sum, and a restart goes on from the newest committed checkpoint.
    """
    if run.first_step == 1 and not run.ending:
        run.evaluate(step=0)
    for step in range(run.first_step, run.last_step + 1):
        if run.ending:
            break
        timer = StepTimer()
        run.begin_step(step)
        with timer("data"):
            batches = run.batches(step)

        loss = run.forward_backward(step, batches)  # gradients are exchanged while backward runs
        run.ask_notice()  # answered after the update
        with timer("checkpoint"):
            run.wait_copied(step)  # the update changes what the last snapshot may still be copying
        update = run.update(step)
        reduced = update.reduced
        run.answer_notice()
        with timer("checkpoint"):
            run.save_if_due(step)

        done = StepDone(
            step=step,
            loss=loss,
            grad_norm=update.grad_norm,
            update_norm=update.update_norm,
            lr=update.lr,
            tokens=sum(map(size_of, batches)),
            step_s=timer.elapsed_s,
            data_s=timer.seconds["data"],
            comm_s=reduced.exposed_s,
            checkpoint_s=timer.seconds["checkpoint"],
            collective_s=reduced.collective_s,
            codec_s=reduced.codec_s,
            wire_bytes=reduced.wire_bytes,
            dense_bytes=reduced.dense_bytes,
            alpha=reduced.alpha,
            residual=reduced.residual,
        )
        run.record_step(done)
        if run.evaluation_due(step):
            run.evaluate(step)
    run.finish()
    run.records.events.write(RunEnded(step=run.done_step, ok=True, reason=run.ended_by))
