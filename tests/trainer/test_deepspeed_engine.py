"""DeepSpeed as an engine: what it saves goes on, its updates are those of DDP, and what cannot be done is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from outlast.errors import CommError, ConfigError, OutlastError, OutOfRange, StateMismatch
from outlast.trainer.engines.build import build_engine
from tests.comm.deepspeed.test_deepspeed import load as load_deepspeed
from tests.comm.ranks import Ranks
from tests.trainer.test_engines import CPU, DENSE, GRADIENTS, UPDATES, Net, assert_close, refused, settings, train

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[int, Ranks]]:
    made = {size: Ranks(size, prepare=load_deepspeed) for size in (2, 4)}
    yield made
    for world in made.values():
        world.close()


def words(folder: Path, stage: int, **more: object) -> list[str]:
    """The settings of an engine with this ZeRO stage."""
    path = folder / f"zero{stage}.json"
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    path.write_text(json.dumps({"zero_optimization": zero, **more}))
    return ["--trainer.engine", "deepspeed", "--deepspeed.config", str(path)]


def with_batches(ranks: int, accumulate: int = 1) -> list[str]:
    return ["--data.batch_size", str(16 // ranks // accumulate), "--trainer.accumulate", str(accumulate)]


@pytest.mark.parametrize(
    ("stage", "comm", "accumulate"),
    [(0, DENSE, 1), (3, DENSE, 2), (1, GRADIENTS, 1), (2, UPDATES, 2)],
    ids=["zero0", "zero3", "zero1-gradients", "zero2-updates"],
)
def test_it_goes_on_bit_for_bit(
    worlds: dict[int, Ranks], tmp_path: Path, stage: int, comm: list[str], accumulate: int
) -> None:
    named = [*words(tmp_path, stage), *comm, *with_batches(2, accumulate)]
    straight = worlds[2].run(train, str(tmp_path / "straight"), 1, 5, named, accumulate)
    worlds[2].run(train, str(tmp_path / "halves"), 1, 3, named, accumulate)
    resumed = worlds[2].run(train, str(tmp_path / "halves"), 4, 5, named, accumulate)
    for one, other in zip(straight, resumed, strict=True):
        assert one[0]
        assert_close(one[0], other[0])
    if comm is DENSE:
        ddp = worlds[2].run(train, str(tmp_path / "ddp"), 1, 5, [*DENSE, *with_batches(2, accumulate)], accumulate)
        for name, tensor in ddp[0][0].items():
            assert_close(straight[0][0][name], tensor, rtol=1e-4, atol=1e-6)
        assert straight[0][2] == [None] * 5 or straight[0][2] == pytest.approx(ddp[0][2], rel=1e-4)


def test_only_what_is_whole_goes_on_with_other_numbers_of_ranks(worlds: dict[int, Ranks], tmp_path: Path) -> None:
    whole, sharded = words(tmp_path, 0), words(tmp_path, 3)
    worlds[4].run(train, str(tmp_path / "whole"), 1, 2, [*whole, *DENSE, *with_batches(4)])
    moved = worlds[2].run(train, str(tmp_path / "whole"), 3, 4, [*whole, *DENSE, *with_batches(2)])
    straight = worlds[2].run(train, str(tmp_path / "straight"), 1, 4, [*DENSE, *with_batches(2)])
    for name in ("head.weight", "blocks.0.bias"):
        assert_close(moved[0][0][name], straight[0][0][name], rtol=1e-4, atol=1e-6)
    worlds[4].run(train, str(tmp_path / "sharded"), 1, 2, [*sharded, *DENSE, *with_batches(4)])
    said = ("ZeRO 3 was saved by 4 ranks, and there are 2",)
    worlds[2].run(refused, str(tmp_path / "sharded"), [*sharded, *DENSE, *with_batches(2)], StateMismatch, *said)
    said = ("not saved under DeepSpeed",)
    worlds[2].run(refused, str(tmp_path / "straight"), [*whole, *DENSE, *with_batches(2)], StateMismatch, *said)


def test_what_contradicts_the_json_is_named(worlds: dict[int, Ranks], tmp_path: Path) -> None:
    worlds[2].run(contradictions, str(tmp_path))
    with pytest.raises(OutOfRange, match=r"deepspeed\.config"):
        settings("--trainer.engine", "deepspeed")
    with pytest.raises(OutOfRange, match=r"deepspeed\.config"):
        settings("--deepspeed.config", "ds.json")
    for more in (["--trainer.precision", "bf16"], ["--trainer.compile", "true"], ["--run.start_from", "a"]):
        with pytest.raises(OutOfRange, match=more[0][2:]):
            settings(*words(tmp_path, 0), *more)


def contradictions(rank: int, folder: str) -> None:
    own = Path(folder) / str(rank)
    own.mkdir()

    def says(error: type[OutlastError], text: str, named: list[str]) -> None:
        with pytest.raises(error) as caught:
            build_engine(Net(), settings(*DENSE, *named), CPU)
        assert text in str(caught.value), caught.value

    says(
        ConfigError,
        "train_micro_batch_size_per_gpu = 3, and data.batch_size is 8",
        words(own, 0, train_micro_batch_size_per_gpu=3),
    )
    adam = {"type": "Adam", "params": {"lr": 0.1}}
    says(ConfigError, "names another", [*words(own, 0, optimizer=adam), "--optim.factory", "torch.optim:SGD"])
    says(ConfigError, "gradient_clipping = 2", [*words(own, 0, gradient_clipping=2), "--optim.clip_norm", "1"])
    says(ConfigError, "DeepSpeed refuses", words(own, 7))
    says(CommError, "ZeRO stage 3", [*words(own, 3), *GRADIENTS, "--comm.compressor", "topk"])
    says(ConfigError, "cannot be read", ["--trainer.engine", "deepspeed", "--deepspeed.config", str(own / "none.json")])
    (own / "bad.json").write_text("{")
    says(ConfigError, "not valid JSON", ["--trainer.engine", "deepspeed", "--deepspeed.config", str(own / "bad.json")])
