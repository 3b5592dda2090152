"""The rooms of outlast as they are in the tree: rooms inside rooms, on the floors that their imports give."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from svg import line, rect, svg, text, width_of, wrap

PACKAGE = Path(__file__).parent.parent / "outlast"
WIDTH, MARGIN, GAP = 1200, 48, 8
KINDS = {"comm": "comm", "checkpoint": "checkpoint", "diagnostics": "diagnostics", "trainer": "run", "launch": "run"}
ORDER = ("comm", "checkpoint", "diagnostics")
"""Of rooms on one floor, left to right; others come after them."""
GROUND = ("config", "events", "errors", "lazy")
LEAST_WIDTH = 236
"""Of a room."""
LEAST_INNER = 170
"""Of a folder beside others."""


def purpose(path: Path) -> str:
    """The first sentence of a module's docstring, without mark-up."""
    words = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].replace("\n", " ")
    words = re.sub(r":\w+:`~?([^`]*)`", r"\1", words).replace("`", "")
    return re.split(r"(?<=[a-z)])\.(?= |$)", words)[0].rstrip(".:")


def imported(path: Path) -> Iterator[str]:
    """What a file imports of outlast when it runs, as dotted names; imports for types alone are left out."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("outlast."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "outlast":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@dataclass
class Part:
    """A folder or a file.

    Args:
        name: without ``.py``.
        files: all of its files.
        path: its docstring's.
    """

    name: str
    files: list[Path]
    path: Path
    needs: set[str] = field(default_factory=set)
    """The neighbours in its folder that it imports."""

    @property
    def folder(self) -> bool:
        return self.path.name == "__init__.py"


def parts_of(folder: Path) -> dict[str, Part]:
    """The folders and files of a folder, by name; its ``__init__`` is its face, and no part."""
    dotted = ".".join(("outlast", *folder.relative_to(PACKAGE).parts))
    parts = {
        **{p.parent.name: Part(p.parent.name, sorted(p.parent.rglob("*.py")), p) for p in folder.glob("*/__init__.py")},
        **{p.stem: Part(p.stem, [p], p) for p in folder.glob("*.py") if p.name != "__init__.py"},
    }
    for part in parts.values():
        words = {
            name.removeprefix(dotted + ".").split(".")[0]
            for f in part.files
            for name in imported(f)
            if name.startswith(dotted + ".")
        }
        part.needs = (words & parts.keys()) - {part.name}
    return parts


def floors(parts: Mapping[str, Part]) -> list[list[Part]]:
    """Lowest first: a part stands one floor above the highest that it imports."""
    heights: dict[str, int] = {}

    def height(name: str) -> int:
        if name not in heights:
            heights[name] = max((1 + height(below) for below in parts[name].needs), default=0)
        return heights[name]

    top = max(map(height, parts))
    return [[parts[name] for name in sorted(parts) if heights[name] == floor] for floor in range(top + 1)]


@dataclass
class Box:
    """A part of a room, as it is drawn."""

    part: Part
    width: float

    @property
    def lines(self) -> list[str]:
        return wrap(purpose(self.part.path), self.width - 20) if self.part.folder else []

    @property
    def height(self) -> float:
        return 26 + 15 * len(self.lines) + (4 if self.lines else 0)

    def draw(self, x: float, y: float, height: float, list_files: bool) -> list[str]:
        if not self.part.folder:
            return [
                rect(x, y, self.width, self.height, "inner", 6),
                text(x + 10, y + 17, f"{self.part.name}.py", "file"),
            ]
        lines = [text(x + 10, y + 35 + 15 * i, words, "small") for i, words in enumerate(self.lines)]
        files = [p.name for p in self.part.files if p.name != "__init__.py"]
        if list_files and self.height + 16 * len(files) < height:
            lines += [text(x + 22, y + self.height + 14 + 16 * i, name, "file") for i, name in enumerate(files)]
        return [
            rect(x, y, self.width, height, "inner", 6),
            text(x + 10, y + 18, f"{self.part.name}/", "file head"),
            *lines,
        ]


def rows_of(floor: list[Part], width: float) -> list[list[Box]]:
    """A floor's folders, side by side where there is room, and its files after them, as wide as their names."""
    folders = [part for part in floor if part.folder]
    files = [Box(part, width_of(part.name + ".py") + 22) for part in floor if not part.folder]
    beside = width - sum(box.width + GAP for box in files)
    if files and beside < LEAST_INNER * len(folders):  # the files take rows of their own
        return [*(rows_of(folders, width) if folders else []), *wrapped(files, width)]
    if width < LEAST_INNER * len(folders):
        return [[Box(part, width)] for part in folders]
    return [[*(Box(part, (beside + GAP) / len(folders) - GAP) for part in folders), *files]]


def wrapped(boxes: list[Box], width: float) -> list[list[Box]]:
    """In as many rows as it takes."""
    rows: list[list[Box]] = [[]]
    for box in boxes:
        if rows[-1] and sum(one.width + GAP for one in [*rows[-1], box]) - GAP > width:
            rows.append([])
        rows[-1].append(box)
    return rows


class Room:
    """A room: its name, what it is for, and its parts on their floors, or in one line where they are files alone."""

    def __init__(self, part: Part, width: float) -> None:
        self.part = part
        self.width = width
        self.words = wrap(purpose(part.path), width - 28)
        inner = floors(parts_of(part.path.parent)) if part.folder else []
        self.rows: list[list[Box]] = []
        self.chain: list[str] = []
        if any(p.folder for floor in inner for p in floor):
            for floor in reversed(inner):
                self.rows += rows_of(floor, width - 28)
        elif inner:
            names = [[p.name for p in floor if p.name != "__main__"] for floor in reversed(inner)]
            self.chain = wrap(
                "\N{NO-BREAK SPACE}› ".join("\N{NO-BREAK SPACE}· ".join(floor) for floor in names if floor), width - 28
            )

    @property
    def head(self) -> float:
        return 34 + 15 * len(self.words)

    @property
    def height(self) -> float:
        rows = sum(max(b.height for b in row) + GAP for row in self.rows)
        return self.head + 6 + rows + 17 * len(self.chain) + (6 if self.rows else 4)

    def draw(self, x: float, y: float, height: float) -> list[str]:
        kind = KINDS.get(self.part.name, "")
        name = self.part.name + ("/" if self.part.folder else ".py")
        out = [
            rect(x, y, self.width, height, kind, 10),
            text(x + 14, y + 26, name, "room" if self.part.folder else "head"),
        ]
        out += [text(x + 14, y + 45 + 15 * i, words, "small") for i, words in enumerate(self.words)]
        at = y + self.head + 6
        more = (height - self.height) / max(sum(row[0].part.folder for row in self.rows), 1)
        for row in self.rows:
            tall = max(b.height for b in row) + (more if row[0].part.folder else 0)
            right = x + 14
            for inner in row:
                out += inner.draw(right, at, tall, list_files=more > 60)
                right += inner.width + GAP
            at += tall + GAP
        return out + [text(x + 14, at + 10 + 17 * i, words, "file") for i, words in enumerate(self.chain)]


def widths_of(floor: list[Part], width: float) -> list[float]:
    """A floor shared out by how many folders its rooms have; none is narrower than ``LEAST_WIDTH``."""
    width -= 12 * (len(floor) - 1)
    folders = [sum(p.folder for p in parts_of(part.path.parent).values()) if part.folder else 0 for part in floor]
    wide = [width * count / (sum(folders) or 1) > LEAST_WIDTH for count in folders]
    if not any(wide):
        return [width / len(floor)] * len(floor)
    shared = width - LEAST_WIDTH * wide.count(False)
    total = sum(count for count, is_wide in zip(folders, wide, strict=True) if is_wide)
    return [shared * n / total if is_wide else LEAST_WIDTH for n, is_wide in zip(folders, wide, strict=True)]


def rooms() -> str:
    """The whole house, its ground floor below."""
    house = parts_of(PACKAGE)
    above = {name: part for name, part in house.items() if name not in GROUND}
    for part in above.values():
        part.needs -= set(GROUND)
    out: list[str] = []
    y = 20.0
    for floor in [*reversed(floors(above)), [house[name] for name in GROUND]]:
        floor = sorted(floor, key=lambda part: ORDER.index(part.name) if part.name in ORDER else len(ORDER))
        drawn = [Room(part, width) for part, width in zip(floor, widths_of(floor, WIDTH - MARGIN - 20), strict=True)]
        tall = max(room.height for room in drawn)
        x = float(MARGIN)
        for room in drawn:
            out += room.draw(x, y, tall)
            x += room.width + 12
        y += tall + 14
    out.append(line(f"24,24 24,{y - 18:g}"))
    turned = f'class="small" transform="translate(16 {y / 2:g}) rotate(-90)" text-anchor="middle"'
    out.append(f"<text {turned}>imports go down, never up</text>")
    return svg(WIDTH, y + 6, "The packages of outlast, in the layers that their imports give", out)
