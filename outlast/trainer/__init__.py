"""The training loop that joins the packages; its parts are usable without it.

``python -m outlast.trainer CONFIG`` is one rank of a run; under torchrun, srun or mpirun it reads its rank from the
environment.
"""

from outlast.trainer.config import Config as Config
from outlast.trainer.data import Corpus as Corpus
from outlast.trainer.data import Loader as Loader
from outlast.trainer.engines.base import Engine as Engine
from outlast.trainer.engines.ddp import DDPEngine as DDPEngine
from outlast.trainer.loop import train as train
from outlast.trainer.main import run_rank as run_rank
from outlast.trainer.model import GPT as GPT
from outlast.trainer.run import Run as Run

__all__ = [
    "GPT",
    "Config",
    "Corpus",
    "DDPEngine",
    "Engine",
    "Loader",
    "Run",
    "run_rank",
    "train",
]
