"""Libraries that own the training loop, with a session inside: Hugging Face's Trainer and Accelerate, and Lightning.

Each is a module of its own, which imports the library that it is for: :mod:`outlast.integrations.huggingface`,
:mod:`outlast.integrations.accelerate`, :mod:`outlast.integrations.lightning`.
"""

__all__: list[str] = []
