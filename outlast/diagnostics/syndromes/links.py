"""The delay matrix: how long a byte takes from each node to each other one, and which cell, row or column is hot.

One hot cell is a link; a hot row is what a node sends, a hot column what it receives: its adapter, or the node itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from outlast.diagnostics.syndromes.trace import Bools, Floats, Ints, Links, Trace
from outlast.diagnostics.syndromes.verdict import Culprit

MOST_HOT = 0.5
"""If more of the known cells are hot, nothing is told apart from anything."""
LEAST_MESSAGES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Hot:
    """Where a matrix is hot."""

    culprit: Culprit
    words: str


def delay_matrix(trace: Trace, since_s: float) -> Floats:
    """[nodes, nodes]: the median seconds a byte took from one node to another since a time on the collector's clock.

    NaN where fewer than three messages are known. Messages inside a node are not counted.
    """
    links, job = trace.links, trace.job
    count = len(job.nodes)
    found = np.full((count, count), np.nan)
    source, target = job.node_of[links.source], job.node_of[links.target]
    took_s = links.done_s - links.begin_s
    begun_s = trace.common_s(links.source, links.begin_s)
    used = np.flatnonzero(np.isfinite(took_s) & (source != target) & (links.nbytes > 0) & (begun_s >= since_s))
    if not len(used):
        return found
    cell = source[used] * count + target[used]
    order = np.argsort(cell, kind="stable")
    cells, starts = np.unique(cell[order], return_index=True)
    for at, part in zip(cells.tolist(), np.split(used[order], starts[1:]), strict=True):
        if len(part) >= LEAST_MESSAGES:
            found[at // count, at % count] = np.median(took_s[part] / links.nbytes[part])
    return found


def find_hot(matrix: Floats, nodes: Sequence[str], factor: float, usual: Floats | None = None) -> Hot | None:
    """Where a delay matrix is hot; None where it is not, or everywhere.

    Args:
        matrix: [nodes, nodes]: seconds a byte, or a message; NaN where unknown.
        nodes: their names.
        factor: a cell is hot that takes this many times as long as the median of the known ones.
        usual: [nodes, nodes]: what was so before; then a cell is hot only if it is hot against that, too.
    """
    known = np.isfinite(matrix)
    if known.sum() < 2:
        return None
    typical = float(np.median(matrix[known]))
    hot = known & (np.nan_to_num(matrix) > factor * typical)
    if usual is not None:
        before = np.where(np.isfinite(usual), usual, typical)
        hot &= np.nan_to_num(matrix) > factor * before
    culprit = locate(hot, known, nodes)
    if culprit is None:
        return None
    worst = float(np.nanmax(np.where(hot, matrix, np.nan)))
    return Hot(
        culprit=culprit,
        words=(
            f"{_cells(hot, nodes)}: {worst * 1e9:.3g} ns a byte, {worst / typical:.1f} times the median of "
            f"{int(known.sum())} known links"
        ),
    )


def locate(hot: Bools, known: Bools, nodes: Sequence[str]) -> Culprit | None:
    """Whose a pattern of hot cells is: of a link, or of a node. None if there is none, or all is hot.

    Args:
        hot: [nodes, nodes].
        known: [nodes, nodes]: cells of which something is known.
        nodes: their names.
    """
    if not hot.any() or (hot.sum() > max(1.0, MOST_HOT * known.sum()) and not _is_cross(hot)):
        return None
    cells = np.argwhere(hot)
    pairs = {tuple(sorted((int(a), int(b)))) for a, b in cells}
    if len(pairs) == 1:
        source, target = map(int, cells[0])
        return Culprit(place="link", nodes=(nodes[source], nodes[target]))
    common = set.intersection(*(set(pair) for pair in pairs))
    if len(common) == 1:
        (node,) = common
        return Culprit(place="node", nodes=(nodes[node],))
    return None


def _is_cross(hot: Bools) -> bool:
    """Whether all hot cells lie in the row and the column of one node."""
    pairs = [{int(a), int(b)} for a, b in np.argwhere(hot)]
    return len(set.intersection(*pairs)) > 0


def _cells(hot: Bools, nodes: Sequence[str]) -> str:
    cells = np.argwhere(hot)
    rows, columns = np.unique(cells[:, 0]), np.unique(cells[:, 1])
    if len(cells) == 1:
        return f"hot cell {nodes[int(rows[0])]} to {nodes[int(columns[0])]}"
    if len(rows) == 1:
        return f"hot row: {len(cells)} links from {nodes[int(rows[0])]}"
    if len(columns) == 1:
        return f"hot column: {len(cells)} links to {nodes[int(columns[0])]}"
    return f"{len(cells)} hot cells"


def outstanding(links: Links, now_s: Floats, limit_s: float) -> Ints:
    """Messages that were handed over longer than the limit ago and are not acknowledged.

    Args:
        links: messages.
        now_s: [messages]: what the clock of each sender's node shows.
        limit_s: in seconds.
    """
    return np.flatnonzero(np.isnan(links.done_s) & (now_s - links.begin_s > limit_s))
