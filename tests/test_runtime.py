"""Parking, waking, starting: in threads, on hubs, and in patched subprocesses."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import threading
import weakref
from math import inf
from time import monotonic

import pytest
from concurrency import (
    DEADLINE_SECONDS,
    Background,
    in_thread,
    on_a_hub,
    run_script,
    wait_until,
)
from interleaving import Once, interleave

from flask_llmstream.core import runtime
from flask_llmstream.core.clock import Timer
from flask_llmstream.core.mailbox import GreenletParker, Mailbox
from flask_llmstream.core.parking import ThreadParker

A_WHILE = 60.0
"""Seconds nobody means to wait."""

# Any parker, in a thread and in a greenlet.

worlds = pytest.mark.parametrize("world", [in_thread, on_a_hub])


@worlds
def test_unpark_before_park_lets_it_return_at_once(world):
    def main():
        parker = runtime.make_parker()
        parker.unpark()
        parker.unpark()  # One permit is enough.
        started_at = monotonic()
        parker.park(started_at + A_WHILE)
        assert monotonic() - started_at < A_WHILE / 2
        # The permit is gone now.
        parker.park(monotonic() + 0.001)

    world(main)


@worlds
def test_a_park_ends_at_its_deadline(world):
    def main():
        parker = runtime.make_parker()
        started_at = monotonic()
        parker.park(started_at + 0.02)
        assert 0.02 <= monotonic() - started_at < 1.0
        parker.park(started_at)  # Has passed.
        parker.park(-inf)
        return monotonic() - started_at

    assert world(main) < 1.0


@worlds
def test_unpark_from_a_thread_ends_a_park(world):
    def main():
        parker = runtime.make_parker()
        for until in (inf, monotonic() + A_WHILE):
            waker = Background(lambda: (runtime.sleep(0.002), parker.unpark()))
            parker.park(until)
            waker.result()

    world(main)


@worlds
def test_sleep_takes_as_long_as_it_should(world):
    def main():
        for seconds in (0.0, -1.0, 0.001, 0.03):
            started_at = monotonic()
            runtime.sleep(seconds)
            assert seconds <= monotonic() - started_at < 10 * max(seconds, 0.02)

    world(main)


def test_a_parker_is_for_its_own_world_only():
    threads = runtime.make_parker()
    assert threads.is_usable_here()

    def main():
        greenlets = runtime.make_parker()
        assert greenlets.is_usable_here()
        assert not threads.is_usable_here()
        assert not in_thread(greenlets.is_usable_here)
        return greenlets

    greenlets = on_a_hub(main)
    assert not greenlets.is_usable_here(), "its hub is gone, and here is none"


def test_a_thread_that_waits_for_ever_takes_signals():
    if not hasattr(signal, "setitimer"):
        pytest.skip("no timers that signal")
    parker = ThreadParker()
    before = signal.signal(signal.SIGALRM, lambda *args: parker.unpark())
    signal.setitimer(signal.ITIMER_REAL, 0.005)
    try:
        parker.park()
    finally:
        signal.signal(signal.SIGALRM, before)


# Greenlets' parkers.


class Watcher:
    """An async watcher of a loop that does not run by itself."""

    def __init__(self, ref):
        self.ref = ref
        self.is_sent = False

    def start(self, callback):
        self.callback = callback

    def send(self):
        self.is_sent = True


class Hub:
    """What the mailbox needs of a hub. `switch` runs the loop until it would block."""

    def __init__(self):
        self.loop = self
        self.watcher = None
        self.errors = []

    def async_(self, *, ref):
        self.watcher = Watcher(ref)
        return self.watcher

    def switch(self):
        while self.watcher.is_sent:
            self.watcher.is_sent = False
            self.watcher.callback()

    def handle_error(self, context, kind, error, traceback):
        self.errors.append(error)


class Waiter:
    """A greenlet that is parked on *parker*; resuming it returns to the hub at once."""

    def __init__(self):
        self.resumed = 0

    def switch(self):
        self.resumed += 1


class OneWaiter:
    """A mailbox of one parker, whose greenlet is resumed by whatever was posted."""

    hub = None

    def __init__(self, let_others_run):
        self.parker = GreenletParker(self, runtime.clock)
        self.waiter = Waiter()
        self._posted = False
        self._let_others_run = let_others_run

    def current_greenlet(self):
        return self.waiter

    def switch_to_hub(self):
        if not self._posted:
            self._let_others_run()
        assert self._posted, "a lost wake-up"
        self._posted = False
        self.parker.resume()
        assert self.waiter.resumed == 1

    def post(self, parker):
        self._posted = True


def test_a_greenlet_about_to_park_misses_no_unpark():
    def prepare():
        unpark = Once(lambda: mailbox.parker.unpark())  # noqa: PLW0108 - made below
        mailbox = OneWaiter(unpark)
        return mailbox.parker.park, unpark, lambda: None

    interleave(prepare)


class ThreadsMailbox:
    """A mailbox whose one greenlet is a thread."""

    hub = None

    def __init__(self):
        self.has_got_so_far = threading.Event()
        self._resumed = threading.Event()

    def current_greenlet(self):
        return self

    def switch_to_hub(self):
        self.has_got_so_far.set()
        assert self._resumed.wait(DEADLINE_SECONDS), "a lost wake-up"
        self._resumed.clear()

    def post(self, parker):
        self._resumed.set()


def test_an_unpark_sees_a_greenlet_that_parks_meanwhile():
    def prepare():
        mailbox = ThreadsMailbox()
        parker = GreenletParker(mailbox, runtime.clock)
        waiters = []

        def park():
            parker.park()
            mailbox.has_got_so_far.set()

        def intrude():
            waiters.append(Background(park))
            assert mailbox.has_got_so_far.wait(DEADLINE_SECONDS)

        return parker.unpark, intrude, lambda: waiters[0].result()  # noqa: PLW0108 - made above

    interleave(prepare)


def test_a_greenlet_about_to_park_misses_no_timer(monkeypatch):
    """An earlier park left a timer; this one relies on it, and it fires at any moment."""
    timers = []

    def call_at(when, function):
        timers.append(Timer(when, function))
        return timers[-1]

    monkeypatch.setattr(runtime.clock, "call_at", call_at)

    def fire():
        for timer in timers:
            function, timer.function = timer.function, None
            if function is not None:
                function()

    for later in (A_WHILE, 2 * A_WHILE, A_WHILE / 2):

        def prepare(later=later):
            timers.clear()
            mailbox = OneWaiter(fire)
            mailbox.parker._set_timer(monotonic() + A_WHILE)
            until = monotonic() + later
            return lambda: mailbox.parker.park(until), fire, lambda: None

        interleave(prepare)


def test_nobody_relies_on_a_timer_that_is_firing(monkeypatch):
    timers = []

    def call_at(when, function):
        timers.append(Timer(when, function))
        return timers[-1]

    monkeypatch.setattr(runtime.clock, "call_at", call_at)

    def prepare():
        timers.clear()
        mailbox = ThreadsMailbox()
        parker = GreenletParker(mailbox, runtime.clock)
        until = monotonic() + A_WHILE
        parker._set_timer(until)
        first = timers[0]
        waiters, woken = [], []

        def park_three_times():
            for _ in range(3):
                parker.park(until)
                woken.append(True)
            mailbox.has_got_so_far.set()

        def intrude():
            waiters.append(Background(park_three_times))
            assert mailbox.has_got_so_far.wait(DEADLINE_SECONDS)

        def check():
            while len(woken) < 3:
                wait_until(lambda: len(woken) == 3 or any(timer.is_pending for timer in timers))
                for timer in timers:
                    runtime.clock._fire(timer)
            waiters[0].result()

        return lambda: runtime.clock._fire(first), intrude, check

    interleave(prepare)


def test_a_greenlet_that_waits_now_shorter_now_longer_keeps_one_timer(monkeypatch):
    timers = []
    call_at = runtime.clock.call_at

    def counted(when, function):
        timers.append(call_at(when, function))
        return timers[-1]

    monkeypatch.setattr(runtime.clock, "call_at", counted)

    def wait_in_turns():
        import gevent

        parker = runtime.make_parker()
        for _ in range(20):
            gevent.spawn(parker.unpark)
            parker.park(monotonic() + A_WHILE)
            assert sum(timer.is_pending for timer in timers) <= 1
            parker.park(monotonic() + 0.001)

    on_a_hub(wait_in_turns)
    assert len(timers) >= 20


def test_a_greenlet_that_is_resumed_in_time_sets_one_timer(monkeypatch):
    timers = []
    call_at = runtime.clock.call_at
    monkeypatch.setattr(
        runtime.clock, "call_at", lambda *args: timers.append(args) or call_at(*args)
    )

    def take_tokens():
        import gevent

        parker = runtime.make_parker()
        for _ in range(50):
            gevent.spawn(parker.unpark)
            parker.park(monotonic() + A_WHILE)

    on_a_hub(take_tokens)
    assert len(timers) == 1


def test_a_killed_greenlets_wake_up_wakes_nobody_else():
    def kill_one():
        import gevent

        parker = runtime.make_parker()
        killed = gevent.spawn(parker.park)
        gevent.sleep(0)
        parker.unpark()  # Its wake-up is on its way,
        killed.kill()  # and finds nobody.
        assert killed.dead
        started_at = monotonic()
        parker.park(started_at + 0.01)
        return monotonic() - started_at

    assert on_a_hub(kill_one) >= 0.01


def test_a_gevent_timeout_ends_a_park():
    def time_out():
        import gevent

        parker = runtime.make_parker()
        with pytest.raises(gevent.Timeout), gevent.Timeout(0.005):
            parker.park(monotonic() + A_WHILE)
        assert parker._greenlet is None

    on_a_hub(time_out)


def test_the_hub_itself_cannot_park():
    def park_on_the_hub():
        import gevent

        errors = []

        def park():
            with pytest.raises(RuntimeError, match="Spawn a greenlet"):
                runtime.sleep(0.001)
            errors.append(None)

        gevent.get_hub().loop.run_callback(park)
        gevent.sleep(0.001)
        return errors

    assert on_a_hub(park_on_the_hub) == [None]


# Mailboxes.


def test_what_is_posted_while_the_hub_drains_is_not_stranded():
    def prepare():
        hub = Hub()
        mailbox = Mailbox(hub)
        first, second = parked_on(mailbox), parked_on(mailbox)
        first.unpark()

        def check():
            hub.switch()
            assert [each._greenlet.resumed for each in (first, second)] == [1, 1]

        hub.watcher.is_sent = False  # The loop has seen it, and calls:
        return hub.watcher.callback, second.unpark, check

    interleave(prepare)


def test_what_is_drained_while_somebody_posts_is_not_forgotten():
    def prepare():
        hub = Hub()
        mailbox = Mailbox(hub)
        first, second = parked_on(mailbox), parked_on(mailbox)
        first.unpark()

        def check():
            hub.switch()
            assert [each._greenlet.resumed for each in (first, second)] == [1, 1]

        return second.unpark, hub.switch, check

    interleave(prepare)


def parked_on(mailbox):
    parker = GreenletParker(mailbox, runtime.clock)
    parker._greenlet = Waiter()
    return parker


def test_many_wake_ups_are_one_send():
    hub = Hub()
    mailbox = Mailbox(hub)
    sends = []
    hub.watcher.send = lambda: sends.append(1)
    for _ in range(10):
        parked_on(mailbox).unpark()

    assert len(sends) == 1


def test_a_waiter_that_fails_strands_nobody_behind_it():
    class Broken(Waiter):
        def switch(self):
            raise ValueError

    hub = Hub()
    mailbox = Mailbox(hub)
    broken, whole = parked_on(mailbox), parked_on(mailbox)
    broken._greenlet = Broken()
    broken.unpark()
    whole.unpark()
    hub.switch()

    assert [type(error) for error in hub.errors] == [ValueError]
    assert whole._greenlet.resumed == 1


def test_who_posts_on_and_on_does_not_hold_the_hub():
    hub = Hub()
    mailbox = Mailbox(hub)
    waiter = parked_on(mailbox)

    class Posting(Waiter):
        def switch(self):
            waiter._has_permit = False
            waiter.unpark()

    waiter._greenlet = Posting()
    waiter.unpark()
    hub.watcher.callback()

    assert hub.watcher.is_sent, "what came meanwhile waits for the loop's next turn"


def test_the_watcher_keeps_the_loop_alive_only_while_somebody_waits():
    def main():
        import gevent

        hub = gevent.get_hub()
        parker = runtime.make_parker()
        watcher = runtime._mailbox_of(hub)._watcher
        assert not watcher.ref
        other = runtime.make_parker()
        waiting = [gevent.spawn(each.park) for each in (parker, other, runtime.make_parker())]
        gevent.sleep(0)
        assert watcher.ref
        waiting[2].kill()
        other.unpark()
        waiting[1].join()
        assert watcher.ref, "one still waits"
        waker = Background(lambda: (runtime.sleep(0.01), parker.unpark()))
        # No LoopExit, though nothing of gevent's own is pending.
        assert hub.join(timeout=DEADLINE_SECONDS)
        waker.result()
        assert waiting[0].dead
        assert not watcher.ref
        assert hub.join(), "nobody waits, so it returns at once"

    on_a_hub(main)


# Hubs that come and go.


def test_a_hub_can_be_destroyed_by_a_greenlet_that_was_just_resumed():
    def leave_a_sleeper_behind():
        import gevent

        gevent.spawn(gevent.sleep, 3600)
        runtime.sleep(0.001)

    # `on_a_hub` destroys the hub next, which throws into what resumed us.
    on_a_hub(leave_a_sleeper_behind)


def test_wake_ups_for_a_hub_that_is_gone_are_dropped():
    def main():
        import gevent

        parker = runtime.make_parker()
        gevent.spawn(parker.park)
        gevent.sleep(0)
        return parker

    parker = on_a_hub(main)
    parker.unpark()
    assert not parker._mailbox.is_open


def test_the_main_threads_hub_serves_else_the_first_one(monkeypatch):
    class ThreadHub(Hub):
        def __init__(self, *, main_hub, thread_ident):
            super().__init__()
            self.main_hub = main_hub
            self.thread_ident = thread_ident

    monkeypatch.setattr(runtime, "_home", None)
    monkeypatch.setattr(runtime, "_own_threads", {1})
    engine = ThreadHub(main_hub=False, thread_ident=1)
    other = ThreadHub(main_hub=False, thread_ident=2)
    another = ThreadHub(main_hub=False, thread_ident=3)
    main = ThreadHub(main_hub=True, thread_ident=4)

    def home_after(hub):
        monkeypatch.setattr(runtime, "current_hub", lambda: hub)
        home = runtime._find_home()
        return home and home.hub

    assert home_after(None) is None
    assert home_after(engine) is None
    assert home_after(other) is other
    assert home_after(another) is other
    assert home_after(main) is main
    assert home_after(other) is main
    main.loop = None
    assert home_after(None) is None
    assert home_after(another) is another


# Threads.


def test_start_thread_runs_on_a_native_thread():
    idents = []
    runtime.start_thread(lambda: idents.append(runtime.get_thread_id()))
    wait_until(lambda: idents)

    assert idents[0] != runtime.get_thread_id()
    wait_until(lambda: idents[0] not in runtime._own_threads)


def test_a_thread_destroys_the_hub_that_user_code_grew():
    hubs = []

    def grow_a_hub():
        import gevent

        hubs.append(gevent.get_hub())
        runtime.sleep(0.001)
        assert hubs[0] in runtime._mailboxes

    runtime.start_thread(grow_a_hub)
    wait_until(lambda: hubs and hubs[0].loop is None)
    assert hubs[0] not in runtime._mailboxes


def test_spawn_takes_a_thread_where_there_are_no_greenlets():
    threads = []
    assert not runtime.is_patched()
    assert not runtime.has_greenlets()
    runtime.spawn(lambda: threads.append(threading.get_ident()))
    wait_until(lambda: threads)

    assert threads != [threading.get_ident()]


def test_spawn_greenlet_needs_a_hub(monkeypatch):
    monkeypatch.setattr(runtime, "_home", None)
    with pytest.raises(RuntimeError, match="no gevent hub"):
        runtime.spawn_greenlet(lambda: None)


def test_greenlets_are_spawned_on_the_serving_hub(monkeypatch):
    monkeypatch.setattr(runtime, "_home", None)
    monkeypatch.setattr(runtime, "is_patched", lambda: True)

    def serve():
        import gevent

        where = []

        def note():
            where.append((threading.get_ident(), gevent.getcurrent()))

        assert runtime.has_greenlets()
        runtime.spawn_greenlet(note)
        Background(lambda: runtime.spawn_greenlet(note)).result()
        Background(lambda: runtime.spawn(note)).result()
        wait_until(lambda: len(where) == 3)
        assert {ident for ident, _ in where} == {threading.get_ident()}
        assert gevent.getcurrent() not in {greenlet for _, greenlet in where}

    on_a_hub(serve)


def test_originals_are_found_without_gevent(monkeypatch):
    monkeypatch.delitem(sys.modules, "gevent.monkey", raising=False)
    monkeypatch.delitem(sys.modules, "gevent._hub_local", raising=False)

    assert runtime.original("time", "monotonic") is monotonic
    assert not runtime.is_patched()
    assert runtime.current_hub() is None
    assert isinstance(runtime.make_parker(), ThreadParker)


def test_native_locks_are_native():
    lock = runtime.allocate_lock()
    assert lock.acquire(False)
    assert not lock.acquire(False)


# What waits on sockets.


def test_a_wait_on_a_socket_can_be_given_up():
    def main():
        import gevent
        from gevent import socket as gevent_socket

        ours, theirs = gevent_socket.socketpair()
        interruptible = runtime.make_interruptible()
        interruptible.begin()
        waker = Background(lambda: (runtime.sleep(0.005), interruptible.interrupt()))
        with pytest.raises(runtime.Interrupted):
            ours.recv(1)
        waker.result()
        interruptible.end()
        interruptible.interrupt()  # Too late: nothing happens.
        gevent.sleep(0.005)
        ours.close()
        theirs.close()

    on_a_hub(main)
    assert runtime.make_interruptible() is None


def test_a_socket_can_be_shut_down_from_any_thread():
    ours, theirs = socket.socketpair()
    reader = Background(lambda: ours.recv(1))
    runtime.shut_down_socket(ours)

    assert reader.result() == b""
    ours.close()
    theirs.close()
    runtime.shut_down_socket(ours)  # Closed already: nothing happens.


# Detached calls.


def test_detached_calls_run_in_order_though_one_leaves_with_system_exit(caplog):
    called = []

    def leave():
        sys.exit("a user's callback")

    runtime.run_detached(lambda: called.append(1))
    runtime.run_detached(leave)
    runtime.run_detached(lambda: called.append(2))
    runtime.run_detached(lambda: called.append(threading.get_ident()))
    wait_until(lambda: len(called) == 3)

    assert called[:2] == [1, 2]
    assert called[2] != threading.get_ident()
    assert "A callback failed" in caplog.text


def test_a_detached_call_that_takes_long_holds_up_no_timer():
    release = runtime.allocate_lock()
    release.acquire()
    fired = threading.Event()
    runtime.run_detached(release.acquire)
    runtime.clock.call_soon(fired.set)

    assert fired.wait(DEADLINE_SECONDS)
    release.release()


def test_a_finalizer_may_detach_a_call():
    called = []

    class Body:
        def __init__(self):
            self.cycle = self

        def __del__(self):
            runtime.run_detached(lambda: called.append(1))

    for _ in range(50):
        Body()
    gc.collect()
    wait_until(lambda: len(called) == 50)


# Logging.


def test_log_writes_at_once_where_nothing_is_patched(caplog):
    logger = logging.getLogger("test_runtime")
    error = ValueError("reason")
    with caplog.at_level(logging.INFO, "test_runtime"):
        runtime.log(logger, logging.INFO, "%s and %s", "one", "two")
        runtime.log(logger, logging.ERROR, "failed", error=error)
        runtime.log(logger, logging.DEBUG, "not said")
        on_a_hub(lambda: runtime.log(logger, logging.INFO, "on a hub"))

    assert [record.getMessage() for record in caplog.records] == [
        "one and two",
        "failed",
        "on a hub",
    ]
    assert caplog.records[1].exc_info[1] is error


def test_a_native_threads_record_waits_for_a_greenlet(monkeypatch, caplog):
    """As in a patched process, where its handler's lock may be a greenlet's."""
    monkeypatch.setattr(runtime, "_home", None)
    monkeypatch.setattr(runtime, "is_patched", lambda: True)
    logger = logging.getLogger("test_runtime")

    def serve():
        runtime.sleep(0.001)
        Background(lambda: runtime.log(logger, logging.ERROR, "from a thread")).result()
        assert caplog.records == [], "no greenlet ran yet"
        wait_until(lambda: caplog.records)

    on_a_hub(serve)
    assert caplog.records[0].getMessage() == "from a thread"
    assert caplog.records[0].thread != threading.get_ident()


def test_logging_stays_as_it_is_where_nothing_is_patched():
    lock = logging._lock
    runtime.make_logging_native()

    assert logging._lock is lock


@pytest.mark.parametrize(
    "scenario",
    [
        "nobody_gets_stuck",
        "a_handler_that_replaces_another_is_made_native_too",
        "a_lock_that_is_held_is_left_for_next_time",
        "a_handler_that_may_switch_keeps_its_greenlet_lock",
        "handlers_come_and_go_while_everybody_logs",
        "a_native_threads_record_is_written_on_the_hub",
        "fork_leaves_logging_usable",
    ],
)
def test_logging_in_a_patched_process(scenario):
    run_script("patched_logging.py", scenario)


# Forks, and whatever else needs a process of its own.


@pytest.mark.parametrize(
    "scenario",
    [
        "accidental_hubs_serve_nobody",
        "threads_take_their_hubs_along",
        "a_dead_hub_is_no_home",
        "fork_starts_anew",
        "fork_while_threads_hold_things",
        "fork_in_a_child_of_a_fork",
        "everything_is_native_though_all_is_patched",
    ],
)
def test_in_a_patched_process(scenario):
    run_script("patched_runtime.py", scenario)


def test_an_app_may_be_imported_before_its_process_is_patched():
    run_script("patched_late.py")


def test_a_fork_of_threads_starts_anew():
    run_script("forked_threads.py")


def test_owners_are_told_of_a_fork_and_kept_alive_by_nobody():
    class Owner:
        def __init__(self):
            self.forks = 0

        def _after_fork(self):
            self.forks += 1

    owner, gone = Owner(), Owner()
    runtime.after_fork(owner)
    runtime.after_fork(gone)
    gone = weakref.ref(gone)
    gc.collect()
    assert gone() is None
    if hasattr(os, "fork"):
        assert owner in runtime._forkables
