"""Imports point down, and what may be imported where."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import flask_llmstream

PACKAGE = Path(flask_llmstream.__file__).parent

# Lowest first. A module imports from its own layer and from those before it.
LAYERS = (
    {"exceptions", "typing", "_version"},
    {"core"},
    {"framing"},
    {"dialects"},
    {"client", "reconnecting"},
    {"engines", "stores", "instrumentation"},
    {"backends", "models"},
    {
        "admitting",
        "answering",
        "budgets",
        "call",
        "config",
        "errors",
        "handler",
        "hangup",
        "hub_writer",
        "journal",
        "outcome",
        "policy",
        "reception",
        "recording",
        "replaying",
        "registry",
        "responses",
        "tokens",
    },
    {"blueprints", "chat", "cli", "extension", "gunicorn", "service", "shutdown"},
    {"", "__main__", "testing"},
)

REQUIRED = {"blinker", "click", "flask", "flask_llmstream", "msgspec", "werkzeug"}
"""What installing the package installs; gevent too, but see below."""

GEVENT = ("core/mailbox.py", "core/native.py")
"""The only modules that touch gevent, and that only where the process has it."""

GUNICORNS = {"gunicorn.py": {"gunicorn"}}
"""gunicorn itself loads this one."""

PURE = {
    "framing": {"msgspec"},
    "dialects": {"msgspec"},
    "core": set(),
}
"""Bytes and values only: which third-party libraries these may import."""

WORLDLY = {
    "_socket",
    "_thread",
    "asyncio",
    "concurrent",
    "http",
    "multiprocessing",
    "os",
    "select",
    "selectors",
    "signal",
    "socket",
    "socketserver",
    "ssl",
    "subprocess",
    "threading",
    "urllib",
}


ALLOWED_OF_THE_WORLD = {
    "core/parking.py": {"threading"},  # Which thread is the main one.
    "core/runtime.py": {"os"},  # Forks.
}


class Import(NamedTuple):
    line: int
    name: str  # Absolute, dotted.
    is_at_top: bool  # Runs when the module is imported.


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def module_id(path):
    return str(path.relative_to(PACKAGE))


every_module = pytest.mark.parametrize("path", modules(), ids=module_id)


def top_name(path):
    """The package or module right below `flask_llmstream`; "" for itself."""
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def walk(node, *, is_at_top=True):
    """Every node but those that only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            for other in child.orelse:
                yield other, is_at_top
                yield from walk(other, is_at_top=is_at_top)
            continue
        yield child, is_at_top
        is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from walk(child, is_at_top=is_at_top and not is_function)


def imports(path):
    package = ["flask_llmstream", *path.relative_to(PACKAGE).parts[:-1]]
    for node, is_at_top in walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, is_at_top)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from . import runtime` names a module, `from .a import B` does not.
                yield Import(node.lineno, f"{module}.{alias.name}", is_at_top)


def layer_of(name):
    return next((index for index, names in enumerate(LAYERS) if name in names), None)


@every_module
def test_imports_point_down(path):
    own = top_name(path)
    layer = layer_of(own)
    assert layer is not None, f"{own} has no layer yet"
    for each in imports(path):
        parts = each.name.split(".")
        if parts[0] != "flask_llmstream":
            continue
        is_own_module = (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file()
        target = parts[1] if is_own_module else ""
        assert layer_of(target) <= layer, f"{module_id(path)}:{each.line} imports {each.name}"


@every_module
def test_few_touch_gevent(path):
    if module_id(path) in GEVENT:
        return
    gevent = re.compile(r"gevent(\.\w+)*$")
    for node, _ in walk(ast.parse(path.read_text())):
        is_name = isinstance(node, ast.Constant) and isinstance(node.value, str)
        assert not (is_name and gevent.match(node.value)), f"{module_id(path)}:{node.lineno}"
    for each in imports(path):
        assert not gevent.match(each.name), f"{module_id(path)}:{each.line}"


@pytest.mark.parametrize("module", GEVENT)
def test_gevent_is_used_only_where_the_process_has_it(module):
    names = {each.name.split(".")[0] for each in imports(PACKAGE / module)}

    assert not names & {"gevent", "greenlet"}


@every_module
def test_optional_libraries_are_imported_where_they_are_needed(path):
    allowed = REQUIRED | sys.stdlib_module_names | GUNICORNS.get(module_id(path), set())
    for each in imports(path):
        if each.is_at_top:
            assert each.name.split(".")[0] in allowed, f"{module_id(path)}:{each.line}"


@every_module
def test_the_pure_part_knows_no_web_and_no_world(path):
    own = top_name(path)
    if own not in PURE:
        return
    allowed = (sys.stdlib_module_names | {"flask_llmstream"} | PURE[own]) - WORLDLY
    allowed |= ALLOWED_OF_THE_WORLD.get(module_id(path), set())
    for each in imports(path):
        assert each.name.split(".")[0] in allowed, f"{module_id(path)}:{each.line} {each.name}"


def test_importing_the_package_imports_no_optional_library():
    source = (
        "import sys, flask_llmstream\n"
        "names = {name.split('.')[0] for name in sys.modules}\n"
        "print(*sorted(names & {'gevent', 'greenlet', 'gunicorn', 'xllamacpp', 'httpx'}))\n"
    )
    printed = subprocess.run(
        [sys.executable, "-c", source],
        # Coverage would import gevent to follow its greenlets.
        env={name: value for name, value in os.environ.items() if not name.startswith("COV")},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert printed.stdout.split() == []
