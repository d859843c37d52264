"""`engine_stress` in a process that gevent has patched: greenlets and native threads submit."""

# ruff: noqa: E402 - patching comes first
from gevent import monkey

monkey.patch_all()

import faulthandler
import os
import sys
from pathlib import Path

import gevent

sys.path.insert(0, str(Path(__file__).parent.parent))

from engine_stress import hectic, stress

from flask_llmstream.core import runtime

gevent.get_hub()  # As a server has one: greenlet workers go there.
faulthandler.dump_traceback_later(float(os.environ.get("WATCHDOG_SECONDS", "60")), exit=True)
spawners = [runtime.start_thread, gevent.spawn, runtime.start_thread, gevent.spawn, gevent.spawn]
total = 0
with hectic():
    for seed in range(100, 106):
        total += stress(seed, 0.25, spawners, workers=("thread", "greenlet"))
print(total)
