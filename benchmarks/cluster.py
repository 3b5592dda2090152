"""Several hosts on one Linux machine: network namespaces on a bridge, each with a hostname, an address and a link rate.

As a library:

    with Cluster(hosts=4, rate="200mbit") as cluster:
        processes = [host.popen([sys.executable, "-m", "outlast.trainer", …]) for host in cluster.hosts]

From the shell (root):

    python -m benchmarks.cluster up 4 200mbit
    python -m benchmarks.cluster run 4 COMMAND …     on every host at once; $HOST_INDEX is 0, 1, …
    python -m benchmarks.cluster on 2 COMMAND …
    python -m benchmarks.cluster rate 2 50mbit       change one host's link, also while programs run
    python -m benchmarks.cluster cut 2 | heal 2
    python -m benchmarks.cluster down

Rates are written as for tc (``200mbit``, ``1gbit``; ``none`` for no limit). A token bucket applies them to each
direction of each host's link. Delay and loss are not emulated: that needs netem, which not every kernel has. All hosts
share this machine's cores.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from outlast.errors import MissingDependency, OutlastError

_BURST = "512kb"
_QUEUE = "100ms"
_MOST_HOSTS = 64


def _sh(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise OutlastError(
            f"{' '.join(command)} failed: {done.stderr.strip()}", "an emulated cluster needs root and iproute2"
        )
    return done.stdout


@dataclass(frozen=True, slots=True)
class Host:
    """One emulated host.

    Args:
        index: counted from 0.
        name: its namespace and hostname.
        address: its IPv4 address.
        link: the end of its link at the bridge.
    """

    index: int
    name: str
    address: str
    link: str

    def command(self, words: Sequence[str]) -> list[str]:
        """The command line that runs ``words`` on this host."""
        script = f'hostname {self.name}; ip link set lo up; exec "$@"'
        return ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", script, "sh", *words]

    def popen(
        self, words: Sequence[str], env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """Start ``words`` on this host; gloo uses its link."""
        base = dict(os.environ if env is None else env)
        base |= {"HOST_INDEX": str(self.index), "GLOO_SOCKET_IFNAME": "eth0"}
        return subprocess.Popen(self.command(words), env=base, **options)

    def set_rate(self, rate: str) -> None:
        """Limit both directions of this host's link; ``none`` lifts the limit."""
        for where in (["ip", "netns", "exec", self.name, "tc"], ["tc"]):
            device = "eth0" if where[0] == "ip" else self.link
            if rate == "none":
                _sh(*where, "qdisc", "del", "dev", device, "root", check=False)
            else:
                limit = ["tbf", "rate", rate, "burst", _BURST, "latency", _QUEUE]
                _sh(*where, "qdisc", "replace", "dev", device, "root", *limit)

    def cut(self) -> None:
        """Take the link down."""
        _sh("ip", "link", "set", self.link, "down")

    def heal(self) -> None:
        """Take the link up."""
        _sh("ip", "link", "set", self.link, "up")

    def bytes_sent(self) -> int:
        """Bytes that this host's interface has sent since it was created, including headers."""
        text = _sh("ip", "netns", "exec", self.name, "ip", "-s", "link", "show", "dev", "eth0")
        lines = text.splitlines()
        at = next(i for i, line in enumerate(lines) if line.strip().startswith("TX:"))
        return int(re.findall(r"\d+", lines[at + 1])[0])


class Cluster:
    """Hosts on one bridge; a context manager that removes them at the end.

    Args:
        hosts: how many.
        rate: of every link, in tc's words.
        prefix: of the names of namespaces and links, so that clusters can stand side by side (at most 5 letters).
        subnet: the first three bytes of the addresses; a /24 that nothing else on this machine uses.

    Raises:
        MissingDependency: not root, or iproute2 is not installed.
    """

    def __init__(self, hosts: int, rate: str = "none", *, prefix: str = "olb", subnet: str = "10.98.0") -> None:
        if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"):
            raise MissingDependency(
                "an emulated cluster needs root, ip and tc", "run as root; apt-get install iproute2"
            )
        if not 1 <= hosts <= _MOST_HOSTS:
            raise OutlastError(f"{hosts} hosts were requested", f"request 1 to {_MOST_HOSTS}")
        self.bridge = f"{prefix}br"
        self.subnet = subnet
        self.rate = rate
        self.hosts = [Host(i, f"{prefix}{i}", f"{subnet}.{i + 1}", f"{prefix}v{i}") for i in range(hosts)]

    def up(self) -> Self:
        """Create hosts and links, after removing those of an earlier cluster with the same prefix."""
        self.down()
        _sh("ip", "link", "add", self.bridge, "type", "bridge")
        _sh("ip", "addr", "add", f"{self.subnet}.254/24", "dev", self.bridge)
        _sh("ip", "link", "set", self.bridge, "up")
        for host in self.hosts:
            _sh("ip", "netns", "add", host.name)
            _sh("ip", "link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            _sh("ip", "link", "set", host.link, "master", self.bridge, "up")
            _sh("ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _sh("ip", "-n", host.name, "link", "set", "eth0", "up")
            _sh("ip", "-n", host.name, "link", "set", "lo", "up")
            host.set_rate(self.rate)
        return self

    def set_rate(self, rate: str) -> None:
        """Limit every link."""
        for host in self.hosts:
            host.set_rate(rate)

    def down(self) -> None:
        """Kill what runs on the hosts, and remove hosts, links and bridge."""
        for host in self.hosts:
            for pid in _sh("ip", "netns", "pids", host.name, check=False).split():
                _sh("kill", "-9", pid, check=False)
            _sh("ip", "netns", "del", host.name, check=False)
            _sh("ip", "link", "del", host.link, check=False)
        _sh("ip", "link", "del", self.bridge, check=False)

    def __enter__(self) -> Self:
        return self.up()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.down()


def main(words: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    match list(words):
        case ["up", hosts, *rate]:
            Cluster(int(hosts), *(rate or ["none"])).up()
        case ["down"]:
            Cluster(_MOST_HOSTS).down()
        case ["run", hosts, *command] if command:
            started = [host.popen(command) for host in Cluster(int(hosts)).hosts]
            return max(process.wait() for process in started)
        case ["on", index, *command] if command:
            return Cluster(int(index) + 1).hosts[-1].popen(command).wait()
        case ["rate", index, rate]:
            Cluster(int(index) + 1).hosts[-1].set_rate(rate)
        case ["cut" | "heal" as act, index]:
            host = Cluster(int(index) + 1).hosts[-1]
            host.cut() if act == "cut" else host.heal()
        case _:
            print(__doc__)
            return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except OutlastError as problem:
        print(f"cluster: {problem}", file=sys.stderr)
        sys.exit(1)
