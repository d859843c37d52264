"""What was measured, kept in a file for each measurement until it is measured again."""

from __future__ import annotations

import json
from datetime import datetime, timezone

from . import machine
from .measurements import NAMES, load_measurement

FOLDER = machine.ROOT / "benchmarks" / "results"


def take(name, lab):
    """
    Measure, and return the result: when, on what machine and how busy it was, and the runs.

    The load average is from before: the measurement makes some of its own.
    """
    result = {
        "measurement": name,
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load_average": machine.load_average(),
        "rounds": lab.rounds,
        "seconds": lab.seconds,
        "machine": machine.describe(),
    }
    return {**result, "runs": load_measurement(name).measure(lab)}


def save(result, folder=FOLDER):
    folder.mkdir(exist_ok=True)
    path = folder / f"{result['measurement']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


def load_all(folder=FOLDER):
    """Those there are, in the order of the measurements."""
    paths = (folder / f"{name}.json" for name in NAMES)
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def rows_of(result):
    return load_measurement(result["measurement"]).rows(result["runs"])
