"""``python -m benchmarks``: measure, print what came of the targets, keep the results."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from . import machine, results, tables
from .lab import Lab
from .measurements import NAMES
from .programs import BenchmarkError, compile_programs

STREAMS = "100,300,600,1200,2000,3000,4000"


def read_arguments():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each figure is taken")
    parser.add_argument("--seconds", type=float, default=5, help="how long each time")
    parser.add_argument("--only", default=",".join(NAMES), help="measurements, with commas between")
    parser.add_argument("--streams", default=STREAMS, help="numbers of streams, for streams")
    parser.add_argument(
        "--results", type=Path, default=results.FOLDER, help="folder of the results"
    )
    arguments = parser.parse_args()
    arguments.only = arguments.only.split(",")
    arguments.streams = tuple(map(int, arguments.streams.split(",")))
    if unknown := set(arguments.only) - set(NAMES):
        parser.error(f"no measurement {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    return arguments


def warn(text):
    print(f"Warning: {text}", file=sys.stderr)


def main():
    arguments = read_arguments()
    load = machine.load_average()
    print(f"Load average: {load}", file=sys.stderr)
    if load > machine.QUIET_LOAD:
        warn(f"over {machine.QUIET_LOAD}, the figures are rough. Wait until the machine is quiet.")
    if len(machine.processors) < 2:
        warn("server and load share the one processor: the figures are of both.")
    machine.allow_many_files()
    taken = []
    with machine.starting_load(), tempfile.TemporaryDirectory(prefix="benchmarks") as folder:
        programs = Path(folder)
        compile_programs(programs)
        lab = Lab(programs, arguments.rounds, arguments.seconds, arguments.streams)
        for name in arguments.only:
            result = results.take(name, lab)
            results.save(result, arguments.results)
            taken.append(result)
    for result in taken:
        if result["measurement"] == "streams":
            print(tables.stream_figures(result["runs"]), end="\n\n")
    print(tables.targets([row for result in taken for row in results.rows_of(result)]))


if __name__ == "__main__":
    try:
        main()
    except BenchmarkError as error:
        sys.exit(f"benchmarks: {error}")
