"""The blocks of a model: the repeated parts that are compiled, and sharded, each for itself."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from outlast.config import nearest
from outlast.errors import ConfigError


def blocks_of(model: nn.Module, classes: Collection[str] = ()) -> list[nn.Module]:
    """The outermost modules of the named classes; without names those of the classes that a transformers model says
    must not be split, else the modules in the model's lists (``nn.ModuleList``). Empty if there are none.

    Raises:
        ConfigError: the model has no module of a class that is named.
    """
    parts = list(model.named_modules())[1:]
    known = {type(part).__name__ for _, part in parts}
    for name in classes:
        if name not in known:
            raise ConfigError(f"fsdp.blocks: the model has no module of class {name!r}", nearest(name, sorted(known)))
    wanted = set(classes) or set(getattr(model, "_no_split_modules", None) or ())
    found = [(path, part) for path, part in parts if type(part).__name__ in wanted]
    if not found and not classes:
        lists = [(path, part) for path, part in parts if isinstance(part, nn.ModuleList)]
        found = [(f"{path}.{name}", one) for path, part in lists for name, one in part.named_children()]
    found = [(path, part) for path, part in found if any(True for _ in part.parameters())]
    paths = {path for path, _ in found}
    return [part for path, part in found if not _inside(path, paths)]


def compile_model(model: nn.Module) -> None:
    """``torch.compile`` each block, in place, or the whole model if it has none. Parameters keep their names.

    Blocks that are alike share one compilation.
    """
    # Else compiled graphs are cut where buckets of gradients end. A block is small enough to be one.
    torch._dynamo.config.optimize_ddp = False
    for part in blocks_of(model) or [model]:
        part.compile()


def _inside(path: str, others: Collection[str]) -> bool:
    parents = path.split(".")
    return any(".".join(parents[:length]) in others for length in range(1, len(parents)))
