"""Peers that die or fall silent: an error on every survivor, never a hang."""

from __future__ import annotations

import os
import signal
import time

import pytest

from outlast.errors import CommError
from tests.comm.ranks import Ranks
from tests.comm.toy import backward, gradients, wrap

TIMEOUT_S = 4.0


def until_failure(rank: int, sign: signal.Signals) -> tuple[str, float]:
    ddp, reducer = wrap({"timeout_s": TIMEOUT_S}, cap_mb=0.01)
    for step in range(1, 4):
        backward(ddp, gradients(step, rank))
    if rank == 1:
        time.sleep(1)  # so that rank 0 has read all of step 3
        os.kill(os.getpid(), sign)
    started = time.monotonic()
    with pytest.raises(CommError) as caught:
        backward(ddp, gradients(4, rank))
    seconds = time.monotonic() - started
    with pytest.raises(CommError):
        reducer.end_step()
    reducer.close()
    return str(caught.value), seconds


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_peer_is_an_error(sign: signal.Signals) -> None:
    ranks = Ranks(2)
    try:
        ranks.start(until_failure, sign)
        message, seconds = ranks.result(0)
    finally:
        ranks.close()
    assert "all_gather of bucket 0 failed on rank 0 of 2" in message
    assert f"comm.timeout_s = {TIMEOUT_S:g}" in message
    assert "peer died or does not answer" in message
    assert seconds < (TIMEOUT_S if sign == signal.SIGKILL else 3 * TIMEOUT_S)
