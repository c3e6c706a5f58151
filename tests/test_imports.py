"""Modules never import each other in a circle, not even inside functions or for type checkers only."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("artifacts", "training", "export", "serving", "index", "ui")


def modules():
    """Return the path of each module by its name without ``histoseek``."""
    found = {}
    for path in [*ROOT.glob("*.py"), *(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name, path, known):
    """Return the modules that a module imports, anywhere in it."""
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    package = [part for part in package if part]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        start = package[: len(package) - node.level + 1]
        target = ".".join([*start, *([node.module] if node.module else [])])
        for alias in node.names:
            inner = f"{target}.{alias.name}".strip(".")
            found.add(inner if inner in known else target)
    return found - {name}


def circles(arrows):
    """Return the groups of modules that reach each other (Tarjan 1972)."""
    number, low, stack, groups = {}, {}, [], []

    def visit(name):
        number[name] = low[name] = len(number)
        stack.append(name)
        for other in arrows[name]:
            if other not in number:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], number[other])
        if low[name] == number[name]:
            group = [stack.pop()]
            while group[-1] != name:
                group.append(stack.pop())
            groups.append(sorted(group))

    for name in arrows:
        if name not in number:
            visit(name)
    return [group for group in groups if len(group) > 1]


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_no_modules_import_each_other_in_a_circle():
    known = modules()
    arrows = {
        name: imported(name, path, known) & set(known)
        for name, path in known.items()
        if name not in {"", "__main__"}  # the front door hands on what lies behind it
    }
    arrows = {
        name: {other for other in targets if other in arrows} for name, targets in arrows.items()
    }
    assert len(arrows) > 150 and circles(arrows) == []
