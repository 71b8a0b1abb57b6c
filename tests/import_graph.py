"""What imports what under flows, params and tasks, read from the sources: nothing of them is run."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
FILES = sorted(path for top in ("flows", "params", "tasks") for path in (REPOSITORY / top).rglob("*.py"))


def name_of(path: Path) -> str:
    """The dotted name of a module's file; a package's is that of its folder."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Dotted names of everything that these nodes import: `from a import b` gives a.b."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where an arrow leads"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (part.value for part in node.args[:1] if isinstance(part, ast.Constant))


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Like `ast.walk`, but only what importing the module runs: no bodies of functions, nothing for types."""
    yield node
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    for child in ast.iter_child_nodes(node):
        yield from at_import(child)


@cache
def tree_of(module: str) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def of_ours(module: str, nodes: Iterable[ast.AST]) -> frozenset[str]:
    """Modules of ours that these nodes of a module import."""
    targets = set(imports(nodes))
    known = {name if name in MODULES else name.rpartition(".")[0] for name in targets}
    return frozenset(known & MODULES.keys() - {module})


@cache
def imported(module: str) -> frozenset[str]:
    """Modules of ours that a module imports anywhere: in functions and for types alone too."""
    return of_ours(module, ast.walk(tree_of(module)))


@cache
def loaded(module: str) -> frozenset[str]:
    """Modules of ours that importing a module imports at once."""
    return of_ours(module, at_import(tree_of(module)))


def reached(modules: Iterable[str]) -> set[str]:
    """These modules, all that they import, and so on; and the packages above each, with what these load."""
    found, packages, waiting = set(), set(), set(modules)
    while waiting:
        name = waiting.pop()
        found.add(name)
        above = {name[:i] for i, sign in enumerate(name) if sign == "."} & MODULES.keys()
        packages |= above
        waiting |= imported(name).union(*map(loaded, above)) - found
    return found | packages


def circles(graph: dict[str, Iterable[str]]) -> list[set[str]]:
    """Groups of nodes, each of which leads to all others of its group (Tarjan 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        path.append(node)
        for target in graph[node]:
            if target not in order:
                visit(target)
            if target in path:
                lowest[node] = min(lowest[node], lowest[target])
        if lowest[node] == order[node]:
            group = set(path[path.index(node) :])
            del path[path.index(node) :]
            if len(group) > 1:
                found.append(group)

    for node in graph:
        if node not in order:
            visit(node)
    return found
