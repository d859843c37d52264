"""This machine: its processors and their load, the versions, what a process holds of it."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

QUIET_LOAD = 1.5
"""Above this load average, figures are rough."""

ROOT = Path(__file__).parent.parent
PACKAGES = (
    *("Flask", "Werkzeug", "gevent", "greenlet", "gunicorn", "msgspec"),
    *("fastapi", "starlette", "uvicorn", "uvloop", "httptools", "orjson", "pydantic"),
)

processors = sorted(os.sched_getaffinity(0))


def starting_servers():
    """Processes that are started meanwhile stay on the first processor."""
    return pinned(processors[0])


def starting_load():
    """On the second one, where there is one."""
    return pinned(processors[1 % len(processors)])


@contextmanager
def pinned(processor):
    # A child inherits this thread's processors; preexec_fn would not be safe beside threads.
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {processor})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def allow_many_files():
    """As many as the system lets, for this process and those that it starts."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def load_average():
    """Of the last minute."""
    return round(os.getloadavg()[0], 2)


def busy_seconds():
    """For how long the server's processor has not been idle, since the machine started."""
    line = next(
        line
        for line in Path("/proc/stat").read_text().splitlines()
        if line.startswith(f"cpu{processors[0]} ")
    )
    # proc(5): user, nice, system, idle, iowait, irq, softirq, steal; guests are in user.
    _, user, nice, system, _, _, irq, softirq, steal, *_ = line.split()
    ticks = sum(map(int, (user, nice, system, irq, softirq, steal)))
    return ticks / os.sysconf("SC_CLK_TCK")


def private_bytes(pid):
    """What would be free if the process ended."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def describe():
    """What a reader has to know to judge the figures."""
    return {
        "processor": processor_name(),
        "processors": len(processors),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": {name: found for name in PACKAGES if (found := version_of(name))},
        "commit": commit(),
    }


def processor_name():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def version_of(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit():
    """Empty where this is no checkout; with ``+`` where files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
