"""Libraries that own the training loop, with a session inside: Hugging Face's Trainer.

Each is a module of its own, which imports the library that it is for: :mod:`outlast.integrations.huggingface`.
"""

__all__: list[str] = []
