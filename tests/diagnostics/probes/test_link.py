"""The two ends of a link, in this process, over the loopback interface; and strangers."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from outlast.diagnostics.probes.link import LinkLimits, LinkProbe, LinkSeen
from outlast.launch.sealed import Seal

QUICK = LinkLimits(stream_s=0.1, warmup_s=0.02, stream_bytes=8 << 20, pair_s=5.0)
SECRET = b"s" * 32


def seal(secret: bytes = SECRET, purpose: str = "link") -> Seal:
    return Seal(secret, purpose)


def both(first: Callable[[], LinkSeen], second: Callable[[], LinkSeen]) -> tuple[LinkSeen, LinkSeen]:
    with ThreadPoolExecutor(2) as pool:
        return tuple(one.result() for one in (pool.submit(first), pool.submit(second)))  # type: ignore[return-value]


def test_both_ends_measure_what_they_receive_and_the_caller_the_latency() -> None:
    with LinkProbe(seal(), 0, QUICK) as caller, LinkProbe(seal(), 1, QUICK) as called:
        here, there = both(lambda: caller.call(1, "127.0.0.1", called.port, 5.0), lambda: called.answer(0, 5.0))
    assert here.received_bytes_s is not None
    assert there.received_bytes_s is not None
    assert here.received_bytes_s > 1e6
    assert here.latency_s is not None
    assert there.latency_s is None
    assert (here.reason, there.reason) == ("", "")
    assert called.refused == 0
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", called.port), 1.0)


def test_one_that_comes_early_waits_for_its_turn() -> None:
    with (
        LinkProbe(seal(), 0, QUICK) as first,
        LinkProbe(seal(), 1, QUICK) as second,
        LinkProbe(seal(), 2, QUICK) as third,
        ThreadPoolExecutor(2) as pool,
    ):
        early = pool.submit(second.call, 2, "127.0.0.1", third.port, 5.0)
        time.sleep(0.1)
        late = pool.submit(first.call, 2, "127.0.0.1", third.port, 5.0)
        assert third.answer(0, 5.0).received_bytes_s
        assert not early.done()
        assert third.answer(1, 5.0).received_bytes_s
        assert early.result().received_bytes_s
        assert late.result().received_bytes_s


@pytest.mark.parametrize("other", [seal(b"t" * 32), seal(purpose="an earlier link")], ids=["secret", "occasion"])
def test_who_does_not_know_the_secret_is_refused_by_both(other: Seal) -> None:
    with LinkProbe(seal(), 0, QUICK) as caller, LinkProbe(other, 1, QUICK) as called:
        here, there = both(lambda: caller.call(1, "127.0.0.1", called.port, 2.0), lambda: called.answer(0, 0.5))
    assert here.received_bytes_s is None
    assert here.reason
    assert there.reason == "it did not connect within 0 s"
    assert called.refused == 1


def test_an_answer_that_was_recorded_does_not_do() -> None:
    """Somebody listens in place of the node, and repeats what it said to another caller."""
    with LinkProbe(seal(), 0, QUICK) as caller, LinkProbe(seal(), 1, QUICK) as called:
        said: list[bytes] = []
        server = socket.create_server(("127.0.0.1", 0))

        def repeat() -> None:
            for _ in range(2):
                here, _address = server.accept()
                with here, socket.create_connection(("127.0.0.1", called.port), 2.0) as there:
                    if said:
                        here.sendall(said[0])
                        here.recv(1000)
                        here.sendall(said[1])
                        return
                    said.append(there.recv(1000))
                    here.sendall(said[0])
                    there.sendall(here.recv(1000))
                    said.append(there.recv(1000))

        thread = threading.Thread(target=repeat)
        thread.start()
        port = server.getsockname()[1]
        caller.call(1, "127.0.0.1", port, 0.5)
        seen = caller.call(1, "127.0.0.1", port, 0.5)
        thread.join(10.0)
        server.close()
    assert len(said) == 2
    assert seen.reason == "it does not know the run's secret"


def test_a_stranger_who_says_nothing_holds_nobody_up_for_long() -> None:
    with LinkProbe(seal(), 0, QUICK) as caller, LinkProbe(seal(), 1, QUICK) as called:
        stranger = socket.create_connection(("127.0.0.1", called.port), 2.0)
        here, there = both(lambda: caller.call(1, "127.0.0.1", called.port, 5.0), lambda: called.answer(0, 10.0))
        stranger.close()
    assert here.received_bytes_s
    assert there.received_bytes_s
    assert called.refused == 1


def test_nobody_there() -> None:
    with LinkProbe(seal(), 0, QUICK) as one:
        assert one.answer(1, 0.1).reason == "it did not connect within 0 s"
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        assert "refused" in one.call(1, "127.0.0.1", port, 0.1).reason
