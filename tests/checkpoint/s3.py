"""An S3 server on this machine: moto's, a process of its own that can be killed, frozen and started again.

It keeps objects in memory: killed, it has lost them; frozen, it has them and does not answer.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pytest

from outlast.free_port import free_port

BUCKET = "bucket"


class Server:
    """Runs from :meth:`start` to :meth:`kill`, on one port each time."""

    def __init__(self) -> None:
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """With an empty bucket; returns when it answers."""
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            try:
                request = urllib.request.Request(f"{self.url}/{BUCKET}", method="PUT")
                urllib.request.urlopen(request, timeout=60).close()
                return
            except OSError:
                assert self._process.poll() is None, "moto's server ended"
                assert time.monotonic() < deadline, "moto's server does not answer"
                time.sleep(0.05)

    def kill(self) -> None:
        """At once, with all objects; harmless if it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """Connections are taken, nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """As before."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    @contextmanager
    def used(self) -> Iterator[None]:
        """S3 is this server, for any client in this process."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", self.url)
            patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            patch.setenv("AWS_CONFIG_FILE", "/dev/null")
            patch.setenv("AWS_ALLOW_HTTP", "true")  # for obstore
            patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
            patch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"connect_timeout": 2, "read_timeout": 2}})
            # fsspec keeps clients by their options, which do not tell where they are connected to.
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            yield
            fsspec.get_filesystem_class("s3").clear_instance_cache()
