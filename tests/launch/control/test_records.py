"""Records and messages are what they were, and nothing else is taken for one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.launch.control.journal import Journal
from outlast.launch.control.messages import Reply, Report, Wish, from_header, reply_for, to_header
from outlast.launch.control.places import in_order, natural
from outlast.launch.control.records import (
    BadRecord,
    Done,
    Evicted,
    Formed,
    Lead,
    Left,
    Member,
    Over,
    Readmitted,
    Record,
    decode,
    encode,
)

TEXT = st.text(max_size=20)
MEMBERS = st.builds(Member, node=TEXT, agent=TEXT, address=TEXT, store_port=st.integers(0, 65535))
SHARED = {"epoch": st.integers(0, 9), "at": st.floats(0, 1e10)}
FORMED = st.builds(
    Formed,
    **SHARED,
    generation=st.integers(0, 9),
    members=st.lists(MEMBERS, min_size=1, max_size=4, unique_by=lambda one: one.agent).map(tuple),
    least=st.integers(1, 4),
    most=st.integers(1, 4),
)
RECORDS = st.one_of(
    st.builds(Lead, **SHARED, job=TEXT, leader=MEMBERS, port=st.integers(0, 65535)),
    FORMED,
    st.builds(Over, **SHARED, generation=st.integers(0, 9), reason=TEXT, node=TEXT),
    st.builds(Left, **SHARED, generation=st.integers(0, 9), agents=st.lists(TEXT, max_size=3).map(tuple)),
    st.builds(Evicted, **SHARED, node=TEXT, reason=TEXT),
    st.builds(Readmitted, **SHARED, node=TEXT, reason=TEXT),
    st.builds(Done, **SHARED, succeeded=st.booleans(), reason=TEXT),
)


def member(name: str, agent: str = "") -> Member:
    return Member(node=f"{name}/boot", agent=agent or f"agent of {name}", address=name)


def report(name: str, agent: str = "") -> Report:
    return Report(member=member(name, agent), state="waits", ran=-1)


@given(RECORDS)
def test_a_record_is_read_as_it_was_written(record: Record) -> None:
    assert decode(encode(record)) == record


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"v": 2}, "version 2"),
        ({"kind": "crowned"}, "crowned"),
        ({"generation": "3"}, "generation is a str"),
        ({"generation": True}, "generation is a bool"),
        ({"members": 3}, "members"),
        ({"members": [3]}, "a int in place of a Member"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_what_is_no_record(change: dict[str, object], words: str) -> None:
    record = Formed(epoch=1, at=1.0, generation=0, members=(member("a"),), least=1, most=1)
    document = json.loads(encode(record)) | change
    with pytest.raises(BadRecord, match=words):
        decode(json.dumps(document).encode())
    with pytest.raises(BadRecord, match="not JSON"):
        decode(b"\xff")


@given(FORMED, st.integers(0, 3))
def test_messages(formed: Formed, rank: int) -> None:
    journal = Journal()
    journal.take(1, Lead(epoch=1, at=0.0, job="job", leader=member("a"), port=1))
    journal.take(2, Formed(epoch=1, at=0.0, generation=0, members=formed.members, least=1, most=4))
    one = formed.members[rank % len(formed.members)]
    reply = reply_for(journal, one)
    for message in (Report(member=one, state="runs", ran=3), reply, Wish(action="evict", node="a")):
        assert from_header(json.loads(json.dumps(to_header(message)))) == message
    assert isinstance(reply, Reply)
    assert formed.members[reply.rank].agent == one.agent
    with pytest.raises(BadRecord, match="sleeps"):
        from_header(to_header(Report(member=one, state="sleeps", ran=3)))  # type: ignore[arg-type]


def test_an_older_epoch_is_passed_over() -> None:
    journal = Journal()
    journal.take(1, Lead(epoch=1, at=0.0, job="job", leader=member("a"), port=1))
    journal.take(2, Lead(epoch=2, at=0.0, job="job", leader=member("b"), port=1))
    journal.take(3, Evicted(epoch=1, at=0.0, node="c/boot", reason="an order of the one that led before"))
    assert journal.evicted == {}
    journal.take(4, Evicted(epoch=2, at=0.0, node="c/boot", reason="it is slow"))
    assert list(journal.evicted) == ["c/boot"]
    with pytest.raises(ValueError, match="record 6 follows 4"):
        journal.take(6, Evicted(epoch=2, at=0.0, node="d/boot", reason=""))
    journal.take(5, Lead(epoch=5, at=0.0, job="another", leader=member("b"), port=1))
    assert journal.evicted == {}, "another job begins without what was decided for the one before"


@given(
    st.lists(st.sampled_from("abcdefghij"), unique=True, max_size=6),
    st.lists(st.sampled_from("abcdefghij"), unique=True, min_size=1, max_size=8),
    st.integers(1, 8),
)
def test_who_stays_keeps_its_place(before: list[str], now: list[str], most: int) -> None:
    places = in_order([report(name) for name in now], [member(name) for name in before], most)
    names = [one.name for one in places]
    assert len(names) == len(set(names)) == min(most, len(now))
    assert set(names) <= set(now)
    stay = [name for name in before if name in now]
    assert set(stay[:most]) <= set(names), "who was in goes before who was not"
    if len(stay) <= most:
        for rank, name in enumerate(before):
            assert name not in now or rank >= len(names) or names[rank] == name


def test_a_launcher_that_starts_again_gets_the_place_of_its_node() -> None:
    before = [member("a"), member("b"), member("c")]
    places = in_order([report("c"), report("b", "a new one"), report("x"), report("a")], before, 3)
    assert [one.name for one in places] == ["a", "b", "c"]
    assert sorted(["node10", "node9", "rack2/1", "rack10/1"], key=natural) == ["node9", "node10", "rack2/1", "rack10/1"]
