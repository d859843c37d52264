"""Python in a process of its own: patched, forked, killed, whatever a test needs."""

import subprocess
import sys
import textwrap

TIMEOUT_SECONDS = 50


def run_python(source, *arguments, **options):
    """Run *source*, which must exit with 0; returns what it printed."""
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
        **options,
    )
    assert finished.returncode == 0, f"{finished.returncode}\n{finished.stdout}{finished.stderr}"
    return finished.stdout
