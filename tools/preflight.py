"""
Whether this machine has what `make` needs, before anything is downloaded.

    python3 tools/preflight.py               a Python that can make .venv
    python3 tools/preflight.py HOST:PORT     and what it takes to serve there

Says in one line what is missing, and exits with 1. The interpreter may be the very thing
that is too old, so this file is plain Python 3.6.
"""

import ctypes
import errno
import importlib.util
import socket
import sys


def main(arguments):
    problem = check_python() or check_venv()
    if arguments:
        problem = problem or check_openmp() or check_address(arguments[0])
    if problem:
        sys.exit("make: " + problem)


# Each check returns what is wrong and what to do, or nothing.


def check_python(version=sys.version_info):
    if tuple(version[:2]) >= (3, 10):
        return ""
    return (
        f"Python 3.10 or newer is needed; {sys.executable} is {version[0]}.{version[1]}. "
        "Choose another one: make PYTHON=python3.12 ..."
    )


def check_venv():
    # Debian has the one without the other.
    if importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip"):
        return ""
    return (
        f"{sys.executable} cannot make virtual environments. "
        "Install python3-venv (Debian, Ubuntu: apt-get install python3-venv)."
    )


def check_openmp():
    if not sys.platform.startswith("linux"):
        return ""  # The wheels for other systems bring their own.
    try:
        ctypes.CDLL("libgomp.so.1")
    except OSError:
        return (
            "llama.cpp needs the OpenMP runtime libgomp.so.1. "
            "Install libgomp1 (Debian, Ubuntu: apt-get install libgomp1)."
        )
    return ""


def check_address(address):
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit() or int(port) > 65535:
        return f"BIND must be HOST or HOST:PORT, not {address!r}."
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            host, int(port), type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            # As servers do: what a connection just closed leaves behind is no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
    except OSError as exc:
        reason = "it is taken" if exc.errno == errno.EADDRINUSE else exc.strerror or exc
        return f"Cannot serve on {address}: {reason}. Choose another one: make serve PORT=8001"
    return ""


if __name__ == "__main__":
    main(sys.argv[1:])
