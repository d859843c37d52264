"""
The measurements. Each is a module with ``measure(lab)``, which returns what it saw as data
for JSON, and ``rows(runs)``, which says what that means.
"""

from __future__ import annotations

from importlib import import_module

NAMES = (
    *("streams", "knee", "coalescing", "answers"),
    *("dispatch", "memory", "embedded"),
)


def load_measurement(name):
    return import_module(f"{__name__}.{name}")
