"""What `make` finds out before it downloads anything."""

import errno
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FILE = Path(__file__).parent.parent / "tools" / "preflight.py"

preflight = SimpleNamespace(**runpy.run_path(str(FILE)))


def run(*arguments, **environment):
    """What it says and its exit code, as `make` runs it."""
    finished = subprocess.run(
        [sys.executable, FILE, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=30,
        check=False,
    )
    return finished.stdout, finished.returncode


@pytest.fixture
def taken():
    """An address that something listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_nothing_is_wrong_with_this_machine():
    assert run() == ("", 0)
    assert run("127.0.0.1:0") == ("", 0)


def test_a_taken_port_is_one_line(taken):
    said, code = run(taken)
    assert code == 1
    assert said == (
        f"make: Cannot serve on {taken}: it is taken. Choose another one: make serve PORT=8001\n"
    )


def test_a_port_whose_last_connection_was_just_closed_is_free():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        client = socket.create_connection(address)
        connection, _ = server.accept()
        connection.close()  # The side that closes first keeps the port in TIME_WAIT.
        client.close()
    assert preflight.check_address(f"127.0.0.1:{address[1]}") == ""


@pytest.mark.parametrize(
    "address", ["8000", "localhost", ":8000", "[::1]", "h:port", "h:65536", ""]
)
def test_what_is_no_address_is_told_so(address):
    assert preflight.check_address(address) == f"BIND must be HOST or HOST:PORT, not {address!r}."


def test_an_address_of_another_machine_cannot_be_served():
    assert os.strerror(errno.EADDRNOTAVAIL) in preflight.check_address("192.0.2.1:8000")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other wheels bring OpenMP")
def test_a_missing_openmp_runtime_is_named_with_its_package(tmp_path):
    # The loader takes the first file of that name, and this one is no library.
    (tmp_path / "libgomp.so.1").touch()
    said, code = run("127.0.0.1:0", LD_LIBRARY_PATH=str(tmp_path))
    assert code == 1
    assert said == (
        "make: llama.cpp needs the OpenMP runtime libgomp.so.1. "
        "Install libgomp1 (Debian, Ubuntu: apt-get install libgomp1).\n"
    )


def test_without_an_address_no_openmp_runtime_is_needed(tmp_path):
    (tmp_path / "libgomp.so.1").touch()
    assert run(LD_LIBRARY_PATH=str(tmp_path)) == ("", 0)


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 9, 18)])
def test_an_old_python_is_named(version):
    assert preflight.check_python(version).startswith(
        f"Python 3.10 or newer is needed; {sys.executable} is {version[0]}.{version[1]}. "
    )


@pytest.mark.parametrize("version", [(3, 10, 0), (3, 13, 1), (4, 0, 0)])
def test_a_newer_python_will_do(version):
    assert preflight.check_python(version) == ""


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_a_python_without_venv_is_told_the_package(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)  # As if it were not installed.
    assert preflight.check_venv().endswith("(Debian, Ubuntu: apt-get install python3-venv).")
