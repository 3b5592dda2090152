"""No room waits for a peer, a thread or a process without a bound: a wait has a limit, or a reason to need none."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "outlast"
WAITS = {"result", "wait", "join", "get", "acquire"}
LIMITS = {"timeout", "timeout_s", "limit_s"}
ROOMS = ["comm", "diagnostics", "launch", "trainer", "cli"]

WITHOUT_LIMIT = {
    ("comm/transport/communicator.py", "work.wait()"): "its process group has comm.timeout_s",
    ("comm/transport/worker.py", "self._jobs.get()"): "a daemon thread that waits for work; nobody waits for it",
    ("comm/ddp/averager.py", "self._stream.join()"): "orders two streams of the device, and does not wait",
}
"""(file, call): why it ends by itself, or does not wait."""


def unbounded(code: str) -> Iterator[str]:
    """Calls in ``code`` that wait without a limit; those with an argument have one, or are another method's."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WAITS:
            endless = [word for word in node.keywords if word.arg in LIMITS and ast.unparse(word.value) == "None"]
            limited = node.args or any(word.arg in LIMITS for word in node.keywords)
            if endless or not limited:
                yield ast.unparse(node)


def test_waits_are_told_apart() -> None:
    found = unbounded(
        "a.wait(); b.wait(3); c.result(timeout=None); d.result(timeout=2); ','.join(x); e.get('k'); f.get()"
    )
    assert list(found) == ["a.wait()", "c.result(timeout=None)", "f.get()"]


@pytest.mark.parametrize("room", ROOMS)
def test_every_wait_has_a_limit(room: str) -> None:
    files = sorted((PACKAGE / room).rglob("*.py"))
    found = {(str(path.relative_to(PACKAGE)), call) for path in files for call in unbounded(path.read_text())}
    assert found == {place for place in WITHOUT_LIMIT if place[0].startswith(f"{room}/")}
