"""``outlast VERB``: one file per verb, with its arguments; ``ckpt`` is a folder with one file per family of actions.

A new verb is a subclass of :class:`outlast.cli.verb.Verb` in a file of its own, and one line in ``main.py``. Verbs
import what they use when they run, so that reading a command line, and ``--help``, import no torch.
"""

from outlast.cli.main import main as main
