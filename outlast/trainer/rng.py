"""Seeds of the random number generators that a model or a data pipeline may use."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_all(seed: int, rank: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators, differently on each rank."""
    words = np.random.SeedSequence([seed, rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))
