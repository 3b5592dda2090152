"""Libraries that own the training loop, with a session inside. Each is a module of its own, which imports the library
that it is for::

    from outlast.integrations.lightning import SessionCallback
"""

__all__: list[str] = []
