"""Libraries that own the training loop, with a session inside: Hugging Face's Trainer, and loops with its Accelerate.

Each is a module of its own, which imports the library that it is for: :mod:`outlast.integrations.huggingface`,
:mod:`outlast.integrations.accelerate`.
"""

__all__: list[str] = []
