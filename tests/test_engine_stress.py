"""Random schedules: threads that submit, cancel and wait, on engines of random options."""

from __future__ import annotations

import pytest
from concurrency import run_script
from engine_stress import hectic, stress

from flask_llmstream.core import runtime

SECONDS = 0.2


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_every_request_ends_once_and_the_books_add_up(seed):
    with hectic():
        assert stress(seed, SECONDS, [runtime.start_thread] * 4)


def test_so_it_is_in_a_patched_process_with_greenlets_and_native_threads():
    assert int(run_script("engine_patched_stress.py")) > 0
