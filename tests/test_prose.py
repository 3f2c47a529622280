"""The rule of CONTRIBUTING.md for docstrings, where a program can hold it: none begins as a fragment."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(path.parent for path in ROOT.glob("longmem*/__init__.py"))
FRAGMENT = re.compile(r"(Of|As|That|Those|What|Where|Whether|Which|Who|Whom|Whose)\b")
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def fragments(tree: ast.Module) -> list[str]:
    """The first line of each docstring that begins with a relative pronoun or a bare preposition."""
    found = []
    for node in ast.walk(tree):
        about = (ast.get_docstring(node) or "") if isinstance(node, DEFINITIONS) else ""
        if FRAGMENT.match(about):
            found.append(f"{getattr(node, 'name', 'module')}: {about.splitlines()[0]}")
    return found


def test_a_fragment_is_found_wherever_it_stands() -> None:
    source = (
        '"""What it does."""\nclass A:\n    """Of rows."""\n    async def f(self):\n        """\n        As g."""\n'
    )
    assert fragments(ast.parse(source)) == ["module: What it does.", "A: Of rows.", "f: As g."]
    assert not fragments(ast.parse('"""Offsets of rows. What else?"""\ndef howl():\n    """Howls."""\n'))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_no_docstring_begins_as_a_fragment(package: Path) -> None:
    found = [
        f"{path.relative_to(ROOT)}, {line}"
        for path in sorted(package.rglob("*.py"))
        if "triton" not in str(path.relative_to(package))  # called by no user
        for line in fragments(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found, "start with a verb or a noun:\n" + "\n".join(found)
