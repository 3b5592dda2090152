"""The packages joined for anybody's loop: compression, checkpoints, exact resume, events, notices.

::

    with outlast.Session("runs/mine", model, optimizer) as session:
        for step in session.steps(10_000):
            loss = loss_of(session.model, batch(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            session.log(loss=loss)
"""

from outlast.session.session import Session as Session

__all__ = ["Session"]
