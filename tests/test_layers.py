"""Imports point down: read from the code, not from what happens to be loaded."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import flask_llmstream

PACKAGE = Path(flask_llmstream.__file__).parent

# The layer of each module or folder, from docs/architecture.md. A module may import its own
# layer and those below it.
LAYERS = {
    0: ("exceptions", "typing", "_version"),
    1: ("core", "framing", "dialects"),
    2: ("engines",),
    3: ("backends", "models"),
    4: (
        *("config", "policy", "budgets", "hangup", "responses", "tokens", "call", "errors"),
        *("handler",),
    ),
    5: ("extension", "registry", "blueprints", "cli", "chat", "gunicorn", "__main__", "__init__"),
}
BESIDE = {"client": 1, "testing": 1}  # They import no higher than this; backends may use them.
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names} | BESIDE
ALWAYS_THERE = {"flask", "werkzeug", "blinker", "msgspec", "click", "jinja2"}
PURE = ("framing", "dialects")


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    """``core/channel.py`` → ``core``; ``config.py`` → ``config``."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def is_for_types(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports_of(node, path, *, inside_functions):
    """Absolute names of what *node* imports at run time."""
    for child in ast.iter_child_nodes(node):
        if is_for_types(child):
            continue
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and not inside_functions:
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            package = ("flask_llmstream", *path.relative_to(PACKAGE).parts[:-1])
            base = package[: len(package) - child.level + 1] if child.level else ()
            stem = ".".join((*base, *filter(None, [child.module])))
            if child.level and child.module is None:
                yield from (f"{stem}.{alias.name}" for alias in child.names)
            else:
                yield stem
        else:
            yield from imports_of(child, path, inside_functions=inside_functions)


def all_imports(path, *, inside_functions=True):
    return set(imports_of(ast.parse(path.read_text()), path, inside_functions=inside_functions))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    layer = LAYER_OF[name_of(path)]
    for imported in all_imports(path, inside_functions=False):
        if imported.startswith("flask_llmstream."):
            other = imported.split(".")[1]
            assert LAYER_OF[other] <= layer, f"{path.name} imports {imported}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_runtime_names_gevent(path):
    tops = {imported.split(".")[0] for imported in all_imports(path)}
    assert not tops & {"gevent", "greenlet"}
    if path.name != "runtime.py":
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not [text for text in strings if re.fullmatch(r"gevent(\.\w+)*", text)]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optional_libraries_are_imported_where_they_are_needed(path):
    known = ALWAYS_THERE | sys.stdlib_module_names | {"flask_llmstream"}
    tops = {imported.split(".")[0] for imported in all_imports(path, inside_functions=False)}
    assert tops <= known


@pytest.mark.parametrize(
    "path",
    [path for path in modules() if name_of(path) in PURE],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_framing_and_dialects_are_pure(path):
    tops = {imported.split(".")[0] for imported in all_imports(path)}
    assert not tops & {"flask", "werkzeug", "socket", "select", "threading", "asyncio"}
