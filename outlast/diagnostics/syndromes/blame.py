"""In which order ranks that have ended are suspected of being the first cause."""

from __future__ import annotations

BlameKey = tuple[bool, bool, bool, bool, bool]


def blame_key(*, left: bool, hung: bool, lost_peer: bool, status: int, has_message: bool) -> BlameKey:
    """Sorts ranks that have ended, the likely cause first.

    Args:
        left: it left the common order of collectives, or ended well while its peers were not done.
        hung: it was killed because it hung.
        lost_peer: it reports that another rank was lost, and so is a victim.
        status: its exit status; ``-N`` for signal N.
        has_message: whether it has said why.
    """
    return not left, not hung, lost_peer, status >= 0, not has_message
