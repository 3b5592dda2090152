"""Settings of the page that a launcher serves: section ``[page]``."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from outlast.config import require


@dataclass(frozen=True, kw_only=True)
class PageConfig:
    """Whether the launcher of the first node serves the run's report, and whether the job is well, over HTTP.

    The page is computed only when somebody looks at it, in a process of its own beside the launcher, and takes at most
    a tenth of a core. Whoever looks needs a token; the address with the token is in ``RUN/page.url``, which only the
    user who trains can read.
    """

    port: int | None = None
    """Serve it on this port; 0 takes a free one, which the log names. Without it nothing is served."""
    host: str = "127.0.0.1"
    """The address to listen at. By default only this machine reaches the page; 0.0.0.0 opens it to others, and needs
    ``token_file``."""
    token_file: str | None = None
    """A file that contains the token. Without it, each launch makes a token of its own."""
    refresh_s: float = 10.0
    """The page is computed anew at most this often, in seconds, and the browser asks for it as often."""

    def __post_init__(self) -> None:
        port = self.port
        require(port is None or 0 <= port <= 65535, "page.port", port, "0 to 65535, or none")
        alone = port is None and (self.token_file is not None or self.host != "127.0.0.1")
        require(not alone, "page.port", port, "set, with page.token_file or page.host")
        require(self.host != "", "page.host", self.host, "an address of this host: 127.0.0.1, 0.0.0.0, ::1")
        rule = "127.0.0.1, ::1 or localhost without page.token_file: what other machines reach needs a token of yours"
        require(self.token_file is not None or is_loopback(self.host), "page.host", self.host, rule)
        require(1.0 <= self.refresh_s <= 3600.0, "page.refresh_s", self.refresh_s, "1 to 3600 seconds")


def is_loopback(host: str) -> bool:
    """Whether no other machine reaches what listens at ``host``; a name other than localhost may mean anything."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
