"""Every file of a checkpoint matters: damage of any one is found, named, and answered with the step before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from outlast.checkpoint.format.records import Fault, crc_hex, unseal_commit, unseal_vote
from outlast.checkpoint.tools import list_steps, verify
from outlast.errors import (
    CheckpointNotFound,
    CorruptCheckpoint,
    IncompleteCheckpoint,
    StateMismatch,
    UnknownFormatVersion,
)
from outlast.events import CheckpointRestored, Event
from tests.checkpoint.damage import DAMAGES, files_of, flip, steps_at
from tests.checkpoint.helpers import checkpointer, of, rejected, save_by_ranks, save_steps
from tests.checkpoint.states import local, same, state


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 and 2, committed."""
    url = tmp_path_factory.mktemp("pristine") / "checkpoints"
    save_steps(url, 1, 2)
    return url


@pytest.fixture
def url(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "checkpoints"))


def reseal(path: Path, old: str, new: str) -> None:
    """Change a record and its checksum with it."""
    text = path.read_text()
    assert old in text
    body = text.replace(old, new).rpartition(',"crc32c"')[0].encode()
    path.write_bytes(body + f',"crc32c":"{crc_hex(body)}"}}\n'.encode())


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_of_any_file(pristine: Path, tmp_path: Path, damage: str) -> None:
    files = files_of(pristine / "step_00000002")
    assert len(files) > 20
    for number, file in enumerate(files):
        url = Path(shutil.copytree(pristine, tmp_path / f"{number}"))
        DAMAGES[damage](url / "step_00000002" / file)
        cut_off = (damage, file) == ("delete", "commit.json")
        problems = verify(url, 2).problems
        assert [problem.file for problem in problems] == [file]
        assert problems[0].kind == ("IncompleteCheckpoint" if damage == "delete" else "CorruptCheckpoint")
        events: list[Event] = []
        with checkpointer(url, events, attempt_id="two") as reader:
            with pytest.raises(IncompleteCheckpoint if damage == "delete" else CorruptCheckpoint) as error:
                reader.restore(2)
            assert str(url / "step_00000002" / file) in str(error.value)
            assert steps_at(url) == ["step_00000001", "step_00000002"]
            back = reader.restore("auto")
            assert steps_at(url) == ["step_00000001", "step_00000002"]
            reader.wait_copied()  # training goes on from there
        assert back is not None
        assert back.step == 1
        assert same(back.replicated, state(1))
        assert same(back.local, local(1))
        assert rejected(events) == [(2, file)]
        assert [event.step for event in of(CheckpointRestored, events)] == [1]
        assert steps_at(url) == ["step_00000001", "step_00000002.aside-1"], cut_off
        assert len(files_of(url / "step_00000002.aside-1")) == len(files) - (damage == "delete")
        shutil.rmtree(url)


def test_every_single_bit_of_the_records(pristine: Path) -> None:
    commit = (pristine / "step_00000002" / "commit.json").read_bytes()
    vote = (pristine / "step_00000002" / "votes" / "rank_00000.json").read_bytes()
    for data, unseal in ((commit, unseal_commit), (vote[-200:], lambda raw: unseal_vote(raw, "vote"))):
        for position in range(len(data)):
            for bit in range(8):
                raw = bytearray(data)
                raw[position] ^= 1 << bit
                with pytest.raises(Fault) as error:
                    unseal(bytes(raw))
                assert error.value.kind is CorruptCheckpoint


def test_any_file_as_it_was_a_step_before(pristine: Path, tmp_path: Path) -> None:
    """Each a good file, with a good checksum of its own: only what was voted for tells that it is stale."""
    older, stale = pristine / "step_00000001", 0
    for number, file in enumerate(files_of(pristine / "step_00000002")):
        url = Path(shutil.copytree(pristine, tmp_path / f"{number}"))
        place = url / "step_00000002" / file
        differs = place.read_bytes() != (older / file).read_bytes()
        shutil.copyfile(older / file, place)
        stale += differs
        assert [problem.file for problem in verify(url, 2).problems] == ([file] if differs else [])
        with checkpointer(url) as reader:
            back = reader.restore("auto")
        assert back is not None
        assert back.step == (1 if differs else 2)
        assert same(back.replicated, state(back.step))
        shutil.rmtree(url)
    assert stale > 8


def test_any_two_files_that_changed_places(pristine: Path, tmp_path: Path) -> None:
    files = files_of(pristine / "step_00000002")
    for number, (file, other) in enumerate(zip(files, files[1:] + files[:1], strict=True)):
        url = Path(shutil.copytree(pristine, tmp_path / f"{number}"))
        one, two = url / "step_00000002" / file, url / "step_00000002" / other
        before, after = one.read_bytes(), two.read_bytes()
        one.write_bytes(after), two.write_bytes(before)
        problems = {problem.file for problem in verify(url, 2).problems}
        if before == after:
            assert not problems
        elif "commit.json" in (file, other):
            assert problems == {"commit.json"}
        else:
            assert problems & {file, other}
            assert problems <= {file, other}
        with checkpointer(url) as reader:
            back = reader.restore("auto")
        assert back is not None
        assert back.step == (2 if before == after else 1)
        shutil.rmtree(url)


def test_two_chunks_of_one_size_changed_places(url: Path) -> None:
    one = url / "step_00000002" / "optimizer" / "blocks.0.norm.bias" / "exp_avg" / "c.0"
    # Each file ends in a CRC of its own bytes that is right; only the vote knows which belongs where.
    other = url / "step_00000001" / "optimizer" / "blocks.0.norm.bias" / "exp_avg" / "c.0"
    assert one.stat().st_size == other.stat().st_size
    one.write_bytes(other.read_bytes())
    assert [problem.file for problem in verify(url, 2).problems] == ["optimizer/blocks.0.norm.bias/exp_avg/c.0"]


def test_a_step_in_another_steps_place(url: Path) -> None:
    shutil.copytree(url / "step_00000001", url / "step_00000009")
    events: list[Event] = []
    with checkpointer(url, events) as reader:
        back = reader.restore("auto")
    assert back is not None
    assert back.step == 2
    assert rejected(events) == [(9, "commit.json")]


def test_a_vote_of_another_save(url: Path) -> None:
    vote = url / "step_00000002" / "votes" / "rank_00000.json"
    before = vote.read_text()
    reseal(vote, '"epoch": "one"', '"epoch": "two"')
    commit = url / "step_00000002" / "commit.json"
    reseal(commit, f'"{crc_hex(before.encode())}"', f'"{crc_hex(vote.read_bytes())}"')
    assert [problem.file for problem in verify(url, 2).problems] == ["votes/rank_00000.json"]


def test_unknown_version_is_left_alone(url: Path) -> None:
    reseal(url / "step_00000002" / "commit.json", '"format_version": 3', '"format_version": 99')
    for which in ("auto", 2):
        with checkpointer(url) as reader, pytest.raises(UnknownFormatVersion) as error:
            reader.restore(which)  # type: ignore[arg-type]
        assert "99" in str(error.value)
        assert "commit.json" in str(error.value)
    assert steps_at(url) == ["step_00000001", "step_00000002"]
    assert [info.status for info in list_steps(url)] == ["committed", "unknown version"]
    with checkpointer(url, attempt_id="two", keep_last=1) as saver:
        saver.save(3, replicated={}, local={})
    assert steps_at(url) == ["step_00000002", "step_00000003"]


def test_no_valid_one_is_an_error_every_time(url: Path) -> None:
    flip(url / "step_00000001" / "model" / "zarr.json")
    (url / "step_00000002" / "zarr.json").unlink()
    for _ in range(2):
        with checkpointer(url) as reader, pytest.raises(CorruptCheckpoint) as error:
            reader.restore("auto")
        assert "step 1: model/zarr.json" in str(error.value)
        assert "step 2: zarr.json: missing" in str(error.value)
        assert steps_at(url) == ["step_00000001", "step_00000002"]


def test_nothing_there(tmp_path: Path) -> None:
    with checkpointer(tmp_path / "new" / "deep") as reader:
        assert reader.restore("auto") is None
        with pytest.raises(CheckpointNotFound, match="there is no checkpoint"):
            reader.restore(4)
    with pytest.raises(CheckpointNotFound):
        verify(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_another_step_than_those_there(url: Path) -> None:
    with checkpointer(url) as reader, pytest.raises(CheckpointNotFound) as error:
        reader.restore(7)
    assert "1, 2" in str(error.value)


def test_another_number_of_ranks(url: Path) -> None:
    vote = json.loads((url / "step_00000002" / "commit.json").read_text())
    assert vote["world_size"] == 1
    events: list[Event] = []
    reseal(url / "step_00000002" / "commit.json", '"world_size": 1', '"world_size": 2')
    with checkpointer(url, events) as reader:
        back = reader.restore("auto")  # one vote of two ranks: not a record that outlast wrote
    assert back is not None
    assert back.step == 1
    save_by_ranks(url, 5, world_size=2, attempt_id="two")
    with checkpointer(url) as reader, pytest.raises(StateMismatch, match="saved by 2 ranks, this job has 1") as refused:
        reader.restore("auto")
    assert "any_world_size=True" in refused.value.fix
    assert "load_resharded(read, restored.world_size)" in refused.value.fix


def test_going_back_sets_newer_steps_aside(url: Path) -> None:
    events: list[Event] = []
    with checkpointer(url, events, attempt_id="two") as runner:
        back = runner.restore(1)
        assert back is not None
        assert steps_at(url) == ["step_00000001", "step_00000002"]
        assert rejected(events) == [(2, "")]
        runner.wait_copied()
        assert [name for name in steps_at(url) if "lease" not in name] == ["step_00000001", "step_00000002.aside-1"]
        runner.save(2, replicated=state(20), local=local(2))
        again = runner.restore("auto")
    assert again is not None
    assert same(again.replicated, state(20))


def test_left_overs_of_cut_off_saves(url: Path) -> None:
    save_steps(url, 3, 4, attempt_id="two")
    (url / "step_00000003" / "commit.json").unlink()
    (url / "step_00000004" / "commit.json").unlink()
    (url / "step_00000004" / "votes" / "rank_00000.json").unlink()
    assert [info.status for info in list_steps(url)] == ["committed", "committed", "uncommitted", "uncommitted"]
    events: list[Event] = []
    with checkpointer(url, events) as reader:
        with pytest.raises(IncompleteCheckpoint, match=r"commit\.json"):
            reader.restore(3)
        back = reader.restore("auto")
        reader.wait_copied()
    assert back is not None
    assert back.step == 2
    assert rejected(events) == [(3, "commit.json"), (4, "commit.json")]
    # All of step 3 but its record may be there, so it is kept; step 4 never can be complete.
    assert steps_at(url) == ["step_00000001", "step_00000002", "step_00000003.aside-1"]
