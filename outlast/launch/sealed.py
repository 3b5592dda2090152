"""Messages that carry the run's MAC (HMAC-SHA256, FIPS 198-1): whoever reaches a store may write there."""

from __future__ import annotations

import hmac

MAC_BYTES = 32


class Seal:
    """Seals messages of one purpose, and opens those that somebody with the same secret sealed for it.

    Args:
        secret: of the run, the same on all nodes.
        purpose: a message sealed for another one does not open.
    """

    def __init__(self, secret: bytes, purpose: str) -> None:
        self._key = hmac.digest(secret, purpose.encode(), "sha256")

    def seal(self, message: bytes) -> bytes:
        """The message with its MAC before it."""
        return hmac.digest(self._key, message, "sha256") + message

    def open(self, sealed: bytes) -> bytes | None:
        """The message; None if it has no MAC of this secret and purpose."""
        mac, message = sealed[:MAC_BYTES], sealed[MAC_BYTES:]
        return message if hmac.compare_digest(mac, hmac.digest(self._key, message, "sha256")) else None
