"""The programs in C: compiled for each run, since they are small."""

from __future__ import annotations

import json
import subprocess

from . import machine

SOURCES = machine.ROOT / "benchmarks" / "native"
NAMES = ("limit", "load", "requests")


class BenchmarkError(Exception):
    """Something did not run as it must, and what it measured says nothing."""


def compile_programs(folder):
    """
    Put them into *folder*.

    Raises:
        BenchmarkError: There is no C compiler named ``cc``, or it refused.
    """
    for name in NAMES:
        command = ["cc", "-O2", "-Wall", "-Wextra", "-o", folder / name, SOURCES / f"{name}.c"]
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError as exc:
            raise BenchmarkError("There is no cc. Install a C compiler (apt: gcc).") from exc
        except subprocess.CalledProcessError as exc:
            raise BenchmarkError(f"{name}.c does not compile.") from exc


def run_program(program, *arguments):
    """
    The JSON objects that it prints, each when it does.

    Raises:
        BenchmarkError: It failed; with what it said.
    """
    with machine.starting_load():
        process = subprocess.Popen(
            [str(program), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    with process:
        try:
            for line in process.stdout:
                yield json.loads(line)
            if process.wait():
                raise BenchmarkError(process.stderr.read().strip())
        finally:
            process.kill()
