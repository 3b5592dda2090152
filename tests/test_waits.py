"""No room waits for a peer, a thread, a process or a storage without a bound: a wait has a limit, or a reason to need
none."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "outlast"
WAITS = {"result", "wait", "join", "get", "acquire", "shutdown"}
LIMITS = {"timeout", "timeout_s", "timeout_millis", "limit_s"}
ROOMS = ["comm", "checkpoint", "diagnostics", "launch", "session", "trainer", "cli"]

DEVICE = "waits for the device, on which the next step waits as well; a device that hangs is a hang, which is watched"
OWN_THREAD = "the save's own thread; training waits for that with the limit of Background.wait"
DAEMON = "a daemon thread that waits for work; nobody waits for it"

WITHOUT_LIMIT = {
    ("comm/transport/communicator.py", "work.wait()"): "its process group has comm.timeout_s",
    ("comm/transport/worker.py", "self._jobs.get()"): DAEMON,
    ("comm/ddp/averager.py", "self._stream.join()"): "orders two streams of the device, and does not wait",
    ("diagnostics/export/prometheus.py", "self._server.shutdown()"): "its loop looks every half second whether to end",
    ("launch/beside.py", "self._process.wait()"): DAEMON,
    ("session/agreement.py", "work.wait()"): "its process group has a timeout",
    ("launch/launcher.py", "handler.shutdown()"): "asks the rendezvous' store, which has a read timeout of its own",
    ("launch/notice_spread.py", "self.store.get()"): "NoticeStore.get asks whether the key is there, and does not wait",
    ("launch/notice.py", "work.wait()"): "its process group has a timeout",
    ("checkpoint/ending.py", "saving.join()"): "Background.join has a limit of its own",
    ("checkpoint/checkpointer.py", "self._io.shutdown()"): "IoThreads.shutdown has a limit of its own",
    ("checkpoint/checkpointer.py", "self._saving.join()"): "Background.join has a limit of its own",
    ("checkpoint/checkpointer.py", "self._tiers.wait()"): "Background.wait has a limit of its own",
    ("checkpoint/tiers/manager.py", "self.wait()"): "Background.wait has a limit of its own",
    ("checkpoint/tiers/tier.py", "self._newest.join()"): "Background.join has a limit of its own",
    ("checkpoint/save/snapshot.py", "copier.wait()"): DEVICE,
    ("checkpoint/save/source.py", "checksum.result()"): DEVICE,
    ("checkpoint/save/source.py", "all_read.result()"): DEVICE,
    ("checkpoint/save/source.py", "each.shutdown(cancel_futures=True)"): DEVICE,
    ("checkpoint/save/storage_save.py", "self._confirmed.wait()"): OWN_THREAD,
    ("checkpoint/tiers/memory_save.py", "self._confirmed.wait()"): OWN_THREAD,
    ("checkpoint/save/writer.py", "opened.result()"): OWN_THREAD,
    ("checkpoint/save/writer.py", "future.result()"): OWN_THREAD,
    ("checkpoint/save/writer.py", "wait([opened])"): OWN_THREAD,
    ("checkpoint/save/writer.py", "wait(self._futures)"): OWN_THREAD,
    ("checkpoint/storage/io_threads.py", "self._tasks.get()"): DAEMON,
    ("checkpoint/peers/channel.py", "self._socket.settimeout(None)"): "for the next frame to begin, in a daemon thread",
}
"""(file, call): why it ends by itself, or does not wait."""


def unbounded(code: str) -> Iterator[str]:
    """Calls in ``code`` that wait without a limit; those with an argument have one, or are another method's."""
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node)
        words = {word.arg: ast.unparse(word.value) for word in node.keywords}
        endless = any(words.get(limit) == "None" for limit in LIMITS)
        limited = bool(LIMITS & words.keys())
        if isinstance(node.func, ast.Name):  # of concurrent.futures
            if node.func.id in ("wait", "as_completed") and (endless or not limited):
                yield call
        elif isinstance(node.func, ast.Attribute):
            name, at_once = node.func.attr, bool({"wait", "blocking"} & words.keys())
            waits = name in WAITS and not at_once and (endless or not (node.args or limited))
            waits |= name == "flock" and "LOCK_NB" not in call
            waits |= name == "settimeout" and call.endswith("(None)")
            if waits:
                yield call


def test_waits_are_told_apart() -> None:
    found = unbounded(
        "a.wait(); b.wait(3); c.result(timeout=None); d.result(timeout=2); ','.join(x); e.get('k'); f.get()"
    )
    assert list(found) == ["a.wait()", "c.result(timeout=None)", "f.get()"]
    found = unbounded("wait(fs); wait(fs, timeout=3); p.shutdown(); p.shutdown(wait=False); s.settimeout(None)")
    assert list(found) == ["wait(fs)", "p.shutdown()", "s.settimeout(None)"]
    assert list(unbounded("flock(fd, LOCK_EX); fcntl.flock(fd, fcntl.LOCK_EX)")) == ["fcntl.flock(fd, fcntl.LOCK_EX)"]


@pytest.mark.parametrize("room", ROOMS)
def test_every_wait_has_a_limit(room: str) -> None:
    files = sorted((PACKAGE / room).rglob("*.py"))
    found = {(str(path.relative_to(PACKAGE)), call) for path in files for call in unbounded(path.read_text())}
    assert found == {place for place in WITHOUT_LIMIT if place[0].startswith(f"{room}/")}
