"""A real browser, driven over its debugging pipe; no package is needed for it."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")

AS_3_AND_4 = """
import os, sys
ends = [os.dup(os.dup(int(one))) for one in sys.argv[1:3]]
for fd, end in zip((3, 4), ends):
    os.dup2(end, fd)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Where the browser looks for the pipe."""


class Browser:
    """One page of a headless Chromium.

    Args:
        profile: an empty folder.
        address: what is opened.
    """

    def __init__(self, profile: Path, address: str) -> None:
        assert CHROMIUM is not None
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        flags = [*FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "--window-size=1600,1200"]
        # what a sandboxed frame shows is looked at through its parent
        flags += ["--disable-features=IsolateSandboxedIframes"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", AS_3_AND_4, str(to_browser), str(from_browser), CHROMIUM, *flags, "about:blank"],
            pass_fds=(to_browser, from_browser),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._number = 0
        self._rest = b""
        self._session = ""
        (page,) = (one for one in self._call("Target.getTargets")["targetInfos"] if one["type"] == "page")
        found = self._call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = found["sessionId"]
        self._call("Page.enable")
        self._call("Page.navigate", url=address)

    def evaluate(self, script: str, *, in_frame: bool = False) -> Any:
        """The value of an expression, in the page or in its newest frame."""
        context: dict[str, Any] = {}
        if in_frame:
            frames = self._call("Page.getFrameTree")["frameTree"].get("childFrames", [])
            if not frames:
                return None
            world = self._call("Page.createIsolatedWorld", frameId=frames[-1]["frame"]["id"])
            context = {"contextId": world["executionContextId"]}
        result = self._call("Runtime.evaluate", expression=script, returnByValue=True, **context)["result"]
        return result.get("value")

    def close(self) -> None:
        """End it."""
        family = [*psutil.Process(self._process.pid).children(recursive=True)]
        self._process.kill()
        for one in family:
            if one.is_running():
                one.kill()
        self._process.wait(timeout=30)
        os.close(self._out)
        os.close(self._in)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        said: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            said["sessionId"] = self._session
        os.write(self._out, json.dumps(said).encode() + b"\0")
        deadline_s = time.monotonic() + 60
        while True:
            answer = self._next(deadline_s)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                found: dict[str, Any] = answer["result"]
                return found

    def _next(self, deadline_s: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline_s - time.monotonic()))
            assert ready, "the browser does not answer"
            data = os.read(self._in, 1 << 20)
            assert data, "the browser has ended"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        return found
