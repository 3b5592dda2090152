"""outlast: training that outlasts its machines.

Each room is a package of its own and usable without the others:

- :mod:`outlast.comm`         gradients over slow links
- :mod:`outlast.checkpoint`   state that survives
- :mod:`outlast.diagnostics`  what is wrong, and with whom
- :mod:`outlast.launch`       who runs, and where
- :mod:`outlast.trainer`      the loop that joins them

Importing ``outlast`` imports none of them and does no work.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
