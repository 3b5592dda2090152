"""Votes and decisions over connections: whoever is gone, has failed, or does not come is an error, and named."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from outlast.checkpoint.peers.channel import Channel, Listener
from outlast.checkpoint.peers.commit_protocol import CommitProtocol
from outlast.checkpoint.peers.topology import Meeting, Nodes
from outlast.errors import CheckpointError

SECRET = b"s" * 32


def keep_on() -> None:
    """Nobody gives the save up."""


def give_up() -> None:
    raise CheckpointError("given up")


def break_connection(protocol: CommitProtocol) -> None:
    """As a network does, without either end's doing."""
    for channel in list(protocol._peers.values()):
        with suppress(OSError):
            channel._socket.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def two() -> Iterator[tuple[CommitProtocol, CommitProtocol]]:
    """Rank 0's end and rank 1's, connected."""
    first, second = CommitProtocol(0, 2, 5.0), CommitProtocol(1, 2, 5.0)

    def on_channel(channel: Channel) -> None:
        first.read_votes(int(channel.receive()["rank"]), channel)

    listener = Listener("127.0.0.1", SECRET, on_channel, 5.0)
    second.connect(Meeting(Nodes(("a", "b"), (listener.address, ("", 0))), SECRET, None))
    yield first, second
    second.close()
    first.close()
    listener.close()


def test_a_vote_and_a_decision(two: tuple[CommitProtocol, CommitProtocol]) -> None:
    first, second = two
    for save_id in (1, 2):
        second.vote({"serial": save_id, "vote": f"mine of {save_id}"})
        assert first.collect_votes(save_id, keep_on)[1]["vote"] == f"mine of {save_id}"
        first.announce({"serial": save_id, "commit": "yes"})
        assert second.wait_decision(save_id, keep_on)["commit"] == "yes"


def test_a_rank_that_gives_up_ends_the_wait(two: tuple[CommitProtocol, CommitProtocol]) -> None:
    first, second = two
    threading.Timer(0.05, second.announce_failure, (1, "no room")).start()
    with pytest.raises(CheckpointError, match="rank 1 gave up: no room"):
        first.collect_votes(1, keep_on)


def test_a_rank_that_is_gone_ends_the_wait(two: tuple[CommitProtocol, CommitProtocol]) -> None:
    first, second = two
    second.vote({"serial": 1, "vote": ""})
    first.collect_votes(1, keep_on)
    threading.Timer(0.05, second.close).start()
    with pytest.raises(CheckpointError, match="the connection to rank 1 is lost"):
        first.collect_votes(2, keep_on)


def test_the_first_rank_gone_ends_the_wait_of_the_others(two: tuple[CommitProtocol, CommitProtocol]) -> None:
    first, second = two
    second.vote({"serial": 1, "vote": ""})
    first.collect_votes(1, keep_on)
    threading.Timer(0.05, first.close).start()
    with pytest.raises(CheckpointError, match="the connection to rank 0 is lost"):
        second.wait_decision(1, keep_on)


@pytest.mark.parametrize("end", [0, 1])
def test_a_connection_that_breaks_is_made_again_and_no_word_is_lost(
    two: tuple[CommitProtocol, CommitProtocol], end: int
) -> None:
    first, second = two
    for save_id in range(1, 20):
        break_connection(two[end])
        second.vote({"serial": save_id, "vote": f"mine of {save_id}"})
        break_connection(two[end])
        assert first.collect_votes(save_id, keep_on)[1]["vote"] == f"mine of {save_id}"
        break_connection(two[end])
        first.announce({"serial": save_id, "commit": f"yes to {save_id}"})
        break_connection(two[end])
        assert second.wait_decision(save_id, keep_on)["commit"] == f"yes to {save_id}"


def test_a_rank_that_was_lost_is_heard_when_it_comes_back(two: tuple[CommitProtocol, CommitProtocol]) -> None:
    first, second = two
    second.vote({"serial": 1, "vote": ""})
    first.collect_votes(1, keep_on)
    second.close()
    with pytest.raises(CheckpointError, match="lost"):
        second.wait_decision(1, keep_on)
    with pytest.raises(CheckpointError, match="the connection to rank 1 is lost"):
        first.collect_votes(2, keep_on)
    second.vote({"serial": 3, "vote": "again"})
    assert first.collect_votes(3, keep_on)[1]["vote"] == "again"


def test_a_save_that_is_given_up_waits_for_nobody(two: tuple[CommitProtocol, CommitProtocol]) -> None:
    first, second = two
    for wait in (first.collect_votes, second.wait_decision):
        with pytest.raises(CheckpointError, match="given up"):
            wait(1, give_up)


def test_who_does_not_vote_is_named() -> None:
    protocol = CommitProtocol(0, 3, 0.1)
    with pytest.raises(CheckpointError, match=r"no vote within 0\.1 s from rank 1, 2"):
        protocol.collect_votes(1, keep_on)
