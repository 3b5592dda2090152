"""The packages joined for anybody's loop: compression, checkpoints, exact resume, events, notices.

::

    import outlast

    with outlast.Session("runs/mine", model, optimizer) as session:
        for step in session.steps(1000):
            value = loss(session.model, step)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            session.log(loss=value)
"""

from outlast.session.session import Session as Session

__all__ = ["Session"]
