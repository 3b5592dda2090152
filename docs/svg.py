"""What the pictures share: style, boxes, arrows, and text that wraps."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #1c2733 }
  .small { font-size: 12px; fill: #51606f }
  .file { font-size: 12px; fill: #1c2733 }
  .head { font-weight: 600 }
  .room { font-size: 17px; font-weight: 600 }
  .paper { fill: #ffffff; stroke: #d5dde5 }
  .box { fill: #f6f8fa; stroke: #9fb0c0; stroke-width: 1.2 }
  .comm { fill: #e3f0fd; stroke: #4a90d9 } .checkpoint { fill: #e5f6e8; stroke: #4aa564 }
  .diagnostics { fill: #fdf0dd; stroke: #d9963a } .run { fill: #efe9fb; stroke: #8465c9 }
  .inner { fill: #ffffff; fill-opacity: 0.75 }
  .line { stroke: #6b7c8d; stroke-width: 1.4; fill: none; marker-end: url(#tip) }
  .dash { stroke-dasharray: 5 4 }
"""
TIP = (
    '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto-start-reverse">'
    '<path d="M0 0 L8 4 L0 8 z" fill="#6b7c8d"/></marker>'
)

WIDTHS = ((" ijl.,:;'|!()[]/", 0.32), ("ftr", 0.41), ("mwMW", 0.95))
"""Of letters that are not as wide as most, in ems."""


def width_of(words: str, size: float = 12, bold: bool = False) -> float:
    """About how wide a text comes out, in a wide sans-serif font: other fonts take less."""
    ems = sum(next((ems for letters, ems in WIDTHS if c in letters), 0.7 if c.isupper() else 0.61) for c in words)
    return ems * size * (1.1 if bold else 1.0)


def wrap(words: str, width: float, size: float = 12) -> list[str]:
    """A text in lines of at most ``width``."""
    lines: list[str] = []
    for word in words.split(" "):
        if lines and width_of(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """One line, from ``x`` on, standing on ``y``."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(words, quote=False)}</text>'


def rect(x: float, y: float, w: float, h: float, kind: str = "", corner: int = 8) -> str:
    """A box without words."""
    return f'<rect class="box {kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{corner}"/>'


def box(x: float, y: float, w: float, h: float, title: str, lines: Sequence[str], kind: str = "") -> str:
    """A labelled box; ``lines`` stand under its title."""
    out = [rect(x, y, w, h, kind), text(x + 12, y + 24, title, "head")]
    out += [text(x + 12, y + 44 + 17 * i, words, "small") for i, words in enumerate(lines)]
    return "\n".join(out)


def line(points: str, label: str = "", at: tuple[int, int] = (0, 0), dash: bool = False) -> str:
    """An arrow through ``points``, with a label at ``at``."""
    words = text(*at, label, "small") if label else ""
    return f'<polyline class="line{" dash" if dash else ""}" points="{points}"/>{words}'


def svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    """A picture on white paper, so that it reads on dark pages too."""
    sheet = f'<rect class="paper" x="0.5" y="0.5" width="{width - 1:g}" height="{height - 1:g}" rx="10"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(title)}">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n'
        f"<defs>{TIP}</defs>\n{sheet}\n" + "\n".join(parts) + "\n</svg>\n"
    )
