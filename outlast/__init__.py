"""outlast: training that outlasts its machines.

Each package is usable without the others:

- :mod:`outlast.comm`         gradients over slow links
- :mod:`outlast.checkpoint`   state that survives
- :mod:`outlast.diagnostics`  what is wrong, and which rank is at fault
- :mod:`outlast.launch`       starting ranks, and keeping them running
- :mod:`outlast.session`      the four joined for a loop of your own
- :mod:`outlast.trainer`      model, data and engine from a config, in a session

:class:`outlast.Session` is the whole in one object. ``import outlast`` imports none of them, and not torch; a package
is imported when it is first used, as in ``outlast.comm.attach(...)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from outlast.lazy import lazy_modules

if TYPE_CHECKING:
    from outlast import checkpoint as checkpoint
    from outlast import comm as comm
    from outlast import diagnostics as diagnostics
    from outlast import launch as launch
    from outlast import session as session
    from outlast import trainer as trainer
    from outlast.session import Session as Session

__version__ = "0.1.0"

__all__ = ["Session", "__version__", "checkpoint", "comm", "diagnostics", "launch", "session", "trainer"]

__getattr__ = lazy_modules("outlast", __all__[2:], {"Session": "session"})


def __dir__() -> list[str]:
    return __all__
