"""What README, the docs and docstrings show: every fenced block, and every block after a ``::``."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGE = ROOT / "outlast"


@dataclass(frozen=True)
class Block:
    """One block.

    Args:
        name: of the page and the heading above it, or of the object whose docstring it is in; with a number from the
            second on.
        language: of a fence; empty where it has none, and in docstrings.
        code: what it says.
        module: of a docstring: where its names come from.
    """

    name: str
    language: str
    code: str
    module: str = ""


def looks_like_python(code: str) -> bool:
    """Whether it is meant as Python, be it right or wrong: it has a statement, or a call that no formula would have."""
    return bool(
        re.search(r"^\s*(from \w|import \w|with \w.*:$|for \w.*:$|def \w|class \w|@\w)", code, flags=re.M)
        or re.search(r"\w\.\w+\(|^\s*\w+ = [a-z_]{3,}\(([\"'].*?[\"']|\w+)[,)]", code, flags=re.M)
        or re.search(r"\w\([^)]*\b\w+=[^=]", code)
    )


def numbered(blocks: Iterator[Block]) -> Iterator[Block]:
    """Names that come again get a number."""
    count: dict[str, int] = {}
    for block in blocks:
        count[block.name] = count.get(block.name, 0) + 1
        more = f" ({count[block.name]})" if count[block.name] > 1 else ""
        yield Block(block.name + more, block.language, block.code, block.module)


def of_page(page: Path) -> Iterator[Block]:
    """A page's fenced blocks, in order."""
    heading, fence, lines = "", None, list[str]()
    for line in page.read_text().splitlines():
        if fence is None and (found := re.match(r"#+ (.*)", line)):
            heading = found[1]
        if found := re.match(r"```(\w*)$", line.strip()):
            if fence is None:
                fence, lines = found[1], []
            else:
                yield Block(f"{page.relative_to(ROOT)}: {heading}", fence, "\n".join(lines) + "\n")
                fence = None
        elif fence is not None:
            lines.append(line)
    assert fence is None, f"{page}: a block does not end"


def of_docstring(docstring: str) -> Iterator[str]:
    """What is indented below each line that ends in ``::``."""
    lines = docstring.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.rstrip().endswith("::"):
            continue
        margin = len(line) - len(line.lstrip())
        block = []
        for below in lines[number:]:
            if below.strip() and len(below) - len(below.lstrip()) <= margin:
                break
            block.append(below)
        yield textwrap.dedent("\n".join(block)).strip() + "\n"


def of_module(path: Path) -> Iterator[Block]:
    """The blocks of all docstrings of a file."""
    module = ".".join(("outlast", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")

    def walk(node: ast.AST, name: str) -> Iterator[Block]:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            for code in of_docstring(ast.get_docstring(node) or ""):
                yield Block(name, "", code, module)
            for inner in node.body:
                yield from walk(inner, f"{name}.{getattr(inner, 'name', '')}")

    yield from walk(ast.parse(path.read_text()), module)


def all_blocks() -> list[Block]:
    """Of all pages and docstrings."""
    shown = [block for page in PAGES for block in numbered(of_page(page))]
    return shown + [block for path in sorted(PACKAGE.rglob("*.py")) for block in numbered(of_module(path))]
