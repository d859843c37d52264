"""Deadlines and budgets."""

from __future__ import annotations

import math
from time import monotonic

import pytest

from flask_llmstream.core import deadlines
from flask_llmstream.core.deadlines import Budgets, Deadline


@pytest.fixture
def now(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(deadlines, "monotonic", lambda: now[0])
    return now


def test_a_deadline_counts_down_and_expires(now):
    deadline = Deadline.after(2.5)
    assert deadline.at == 1002.5
    assert deadline.remaining_seconds() == 2.5
    assert not deadline.expired

    now[0] = 1002.5
    assert deadline.remaining_seconds() == 0
    assert deadline.expired
    now[0] = 1003.0
    assert deadline.remaining_seconds() == 0, "never negative"


@pytest.mark.parametrize("seconds", [0, -5])
def test_a_deadline_of_no_time_has_passed(seconds):
    assert Deadline.after(seconds).expired


def test_a_deadline_may_be_never():
    deadline = Deadline.after(math.inf)

    assert deadline.remaining_seconds() == math.inf
    assert not deadline.expired


def test_deadlines_compare_by_their_time():
    assert Deadline(1.0) < Deadline(2.0)
    assert min(Deadline(2.0), Deadline(1.0)) == Deadline(1.0)


def test_the_clock_is_the_monotonic_one():
    assert abs(Deadline.after(0).at - monotonic()) < 1.0


def test_a_budget_is_only_ever_shortened():
    ours = Budgets(total_seconds=300, first_token_seconds=60)
    theirs = Budgets(total_seconds=600, first_token_seconds=5, idle_seconds=7)

    assert ours.shortened(theirs) == Budgets(300, 5, 7)
    assert theirs.shortened(ours) == Budgets(300, 5, 7)
    assert ours.shortened(Budgets()) == ours
