"""Engines under gevent: greenlets and native threads, each in its own way."""

from __future__ import annotations

from concurrency import run_script


def test_engines_work_in_a_patched_process():
    # One process for all of the script's scenarios: most of the time goes into its start.
    assert "a_killed_worker_ends_its_run\n" in run_script("engine_patched.py", timeout_seconds=50)
