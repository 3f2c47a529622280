"""The direction of imports: longmem_bench -> longmem -> longmem_kernels, and no circle on the way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("longmem_kernels", "longmem", "longmem_bench")


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(module: str, path: Path) -> Iterator[str]:
    """Names that a file imports, inside functions too; not what only type checkers read."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            yield from (f"{source}.{alias.name}" for alias in node.names)


@cache
def graph() -> dict[str, set[str]]:
    """The modules that each module imports. A name of a package that is no module of it comes from its __init__."""
    known = modules()

    def module_of(name: str) -> str | None:
        while name and name not in known:
            name = name.rpartition(".")[0]
        return name or None

    edges = {}
    for module, path in known.items():
        targets = {module_of(name) for name in imported(module, path)}
        edges[module] = {target for target in targets if target is not None and target != module}
    return edges


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of two or more that reach each other."""
    reach: dict[str, set[str]] = {}
    for start in edges:
        seen, waiting = set(), [start]
        while waiting:
            for target in edges[waiting.pop()] - seen:
                seen.add(target)
                waiting.append(target)
        reach[start] = seen
    groups = {frozenset(other for other in edges if other in reach[one] and one in reach[other]) for one in edges}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circles(graph()) == []


@pytest.mark.parametrize("place", range(len(PACKAGES)))
def test_nothing_imports_a_package_above_it(place: int) -> None:
    above = PACKAGES[place + 1 :]
    wrong = {
        f"{module} imports {target}"
        for module, targets in graph().items()
        for target in targets
        if module.split(".")[0] == PACKAGES[place] and target.split(".")[0] in above
    }
    assert not wrong
