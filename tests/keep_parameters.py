"""``keep_parameters.py FILE CONFIG …``: the trainer; rank 0 also writes the parameters it has in memory at the end."""

import sys

import numpy as np

from outlast import Session
from outlast.trainer import main as module
from outlast.trainer.run import Run

train_as_ever = module.train


def train(session: Session, run: Run) -> None:
    train_as_ever(session, run)
    if run.place.rank == 0:
        np.savez(sys.argv[1], **{name: p.detach().numpy() for name, p in run.engine.model.named_parameters()})


module.train = train
sys.exit(module.main(sys.argv[2:]))
