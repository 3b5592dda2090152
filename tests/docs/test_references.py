"""Dotted names of outlast in README, docs and docstrings lead to something."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from outlast.comm import CommConfig
from tests.docs.blocks import PACKAGE, PAGES, ROOT


def is_there(name: str) -> bool:
    """Whether a module, or an attribute of one, has this name."""
    path, *rest = name.split(".")
    thing = import_module(path)
    for part in rest:
        path += f".{part}"
        if part in getattr(thing, "__annotations__", {}):
            return True
        if not hasattr(thing, part):
            try:
                import_module(path)
            except ModuleNotFoundError:
                return False
        thing = getattr(thing, part)
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_on_pages(page: Path) -> None:
    names = set(re.findall(r"\boutlast(?:\.\w+)+", page.read_text())) - {"outlast.git", "outlast.json"}
    assert not {name for name in names if not is_there(name)}


def test_names_in_docstrings() -> None:
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in PACKAGE.rglob("*.py")
        for name in re.findall(r":\w+:`~?(outlast[.\w]+)`", path.read_text())
        if not is_there(name)
    }
    assert not missing


def test_papers_are_listed() -> None:
    """docs/references.md has each paper that pages and docstrings cite, with a link, once."""
    listed = re.findall(r"\[(\d{4}\.\d{4,5})\]\(https://arxiv\.org/abs/\1\)", (ROOT / "docs/references.md").read_text())
    assert len(listed) == len(set(listed)) > 20
    cited = {
        number
        for path in (*PAGES, *PACKAGE.rglob("*.py"))
        for number in re.findall(r"arxiv[: ]\s*(\d{4}\.\d{4,5})", path.read_text(), flags=re.IGNORECASE)
    }
    assert len(cited) > 15
    assert cited <= set(listed), cited - set(listed)


def test_settings_of_papers_are_there() -> None:
    """What the list says a paper is used in is a setting that is accepted."""
    used = re.findall(r"`(compressor|feedback|target) = \"([\w-]+)\"`", (ROOT / "docs/references.md").read_text())
    assert len(used) > 10
    for name, value in used:
        transport = {"transport": "two-phase"} if value == "ef21-bc" else {}
        CommConfig(**{"target": "gradient", name: value, **transport})


def test_what_is_not_there_is_found() -> None:
    assert is_there("outlast.comm.compressors.TopK")
    assert is_there("outlast.comm.deepspeed")
    assert not is_there("outlast.comm.TopK")
    assert not is_there("outlast.chekpoint")


def test_what_moved_is_where_the_changelog_says() -> None:
    rows = re.findall(r"^\| (.*`.*) \| (`outlast.*) \|$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert len(rows) > 10
    for before, now in rows:
        places = re.findall(r"`(outlast[.\w]*)`", now)
        assert all(map(is_there, places)), now
        if before.startswith("from "):
            names = re.findall(r"`(\w+)`", before.split(":", 1)[1])
            assert all(is_there(f"{places[0]}.{name}") for name in names if name != "Report"), now
