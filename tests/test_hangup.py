"""Noticing that a client has left, on socket pairs."""

import socket
import threading

import pytest
from concurrency import wait_until

from flask_llmstream import hangup
from flask_llmstream.hangup import Connection, HangupWatcher, connection_of
from flask_llmstream.testing import Signal


class Calls:
    """What a watcher called, and a signal for the first call."""

    def __init__(self):
        self.seen = []
        self.came = Signal()

    def __call__(self, is_gone):
        self.seen.append(is_gone)
        self.came.set()


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture(scope="module")
def watcher():
    return HangupWatcher()


def tcp_pair():
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    return ours, theirs


def test_a_close_is_told(watcher, pair):
    ours, theirs = pair
    calls = Calls()
    watcher.watch(ours.fileno(), calls)
    theirs.close()
    calls.came.wait()
    assert calls.seen[0] is True  # On a Unix pair a close is not just a FIN.
    watcher.unwatch(ours.fileno(), calls)


def test_a_fin_is_told_as_a_maybe(watcher):
    ours, theirs = tcp_pair()
    with ours, theirs:
        calls = Calls()
        watcher.watch(ours.fileno(), calls)
        theirs.shutdown(socket.SHUT_WR)
        calls.came.wait()
        assert calls.seen == [False]
        watcher.unwatch(ours.fileno(), calls)


def test_a_write_after_a_fin_tells_a_half_close_from_a_leave(watcher):
    ours, theirs = tcp_pair()
    with ours:
        calls = Calls()
        watcher.watch(ours.fileno(), calls)
        theirs.close()
        calls.came.wait()
        assert calls.seen == [False]
        ours.send(b": ping\n\n")  # A closed peer answers RST.
        wait_until(lambda: True in calls.seen)
        watcher.unwatch(ours.fileno(), calls)


def test_a_client_that_left_before_the_watch_is_told_at_once(watcher, pair):
    ours, theirs = pair
    theirs.close()
    calls = Calls()
    watcher.watch(ours.fileno(), calls)
    calls.came.wait()
    watcher.unwatch(ours.fileno(), calls)


def test_bytes_that_come_are_neither_read_nor_told(watcher, pair):
    ours, theirs = pair
    calls = Calls()
    watcher.watch(ours.fileno(), calls)
    theirs.send(b"GET / HTTP/1.1")  # Pipelined.
    theirs.shutdown(socket.SHUT_WR)
    calls.came.wait()
    assert calls.seen == [False]
    assert ours.recv(100) == b"GET / HTTP/1.1"
    watcher.unwatch(ours.fileno(), calls)


def test_nothing_is_told_after_unwatch(watcher, pair):
    ours, theirs = pair
    unwatched, other_calls = Calls(), Calls()
    watcher.watch(ours.fileno(), unwatched)
    watcher.unwatch(ours.fileno(), unwatched)
    theirs.close()
    other, gone = socket.socketpair()
    with other:
        watcher.watch(other.fileno(), other_calls)
        gone.close()
        other_calls.came.wait()  # One thread tells all, in order.
        watcher.unwatch(other.fileno(), other_calls)
    assert unwatched.seen == []


def test_unwatching_what_is_not_watched_does_nothing(watcher, pair):
    watcher.unwatch(pair[0].fileno(), Calls())
    watcher.unwatch(99999, Calls())
    HangupWatcher().unwatch(pair[0].fileno(), Calls())


def test_a_number_that_is_used_again_belongs_to_its_new_connection(watcher):
    first, first_peer = socket.socketpair()
    number = first.fileno()
    first_calls, second_calls = Calls(), Calls()
    watcher.watch(number, first_calls)
    watcher.unwatch(number, first_calls)
    first.close()
    second, theirs = socket.socketpair()
    with first_peer, second:
        assert second.fileno() == number
        watcher.watch(second.fileno(), second_calls)
        theirs.close()
        second_calls.came.wait()
        watcher.unwatch(second.fileno(), second_calls)
    assert first_calls.seen == []


def test_what_cannot_be_watched_is_left_alone(watcher, tmp_path):
    with (tmp_path / "file").open("w") as file:  # epoll refuses regular files.
        calls = Calls()
        watcher.watch(file.fileno(), calls)
        watcher.unwatch(file.fileno(), calls)
    watcher.watch(99999, calls)


def test_a_callback_that_fails_does_not_stop_the_others(watcher, caplog):
    def fail(is_gone):
        raise RuntimeError("broken")

    first, first_peer = socket.socketpair()
    second, second_peer = socket.socketpair()
    calls = Calls()
    with first, second:
        watcher.watch(first.fileno(), fail)
        watcher.watch(second.fileno(), calls)
        first_peer.close()
        second_peer.close()
        calls.came.wait()
        wait_until(lambda: "A hangup callback failed." in caplog.text)
        watcher.unwatch(first.fileno(), fail)
        watcher.unwatch(second.fileno(), calls)


def test_where_there_is_no_epoll_watching_does_nothing(monkeypatch, pair):
    def no_epoll(module, name):
        raise AttributeError(name)

    watcher = HangupWatcher()
    monkeypatch.setattr(hangup.runtime, "original", no_epoll)
    calls = Calls()
    watcher.watch(pair[0].fileno(), calls)
    watcher.unwatch(pair[0].fileno(), calls)


def test_many_leave_at_once_and_each_is_told(watcher):
    watched = [(*socket.socketpair(), Calls()) for _ in range(100)]
    for ours, _, calls in watched:
        watcher.watch(ours.fileno(), calls)
    for _, theirs, _ in watched:
        theirs.close()
    for ours, _, calls in watched:
        calls.came.wait()
        watcher.unwatch(ours.fileno(), calls)
        ours.close()


# Connections.


def test_several_may_watch_one_connection(pair):
    """A view may read two answers at once, for the one client that it has."""
    ours, theirs = pair
    first, second = Connection(ours), Connection(ours)
    first_calls, second_calls = Calls(), Calls()
    first.watch(first_calls)
    second.watch(second_calls)
    theirs.close()
    first_calls.came.wait()
    second_calls.came.wait()
    first.unwatch()
    second.unwatch()


def test_one_that_stops_watching_leaves_the_others_watching(pair):
    ours, theirs = pair
    first, second = Connection(ours), Connection(ours)
    first_calls, second_calls = Calls(), Calls()
    first.watch(first_calls)
    second.watch(second_calls)
    first.unwatch()
    theirs.close()
    second_calls.came.wait()
    second.unwatch()
    assert first_calls.seen == []


def test_a_later_watch_of_a_half_closed_connection_is_told_too():
    ours, theirs = tcp_pair()
    with ours, theirs:
        first, second = Connection(ours), Connection(ours)
        first_calls, second_calls = Calls(), Calls()
        first.watch(first_calls)
        theirs.shutdown(socket.SHUT_WR)
        first_calls.came.wait()
        second.watch(second_calls)
        second_calls.came.wait()
        first.unwatch()
        second.unwatch()


def test_unwatch_may_be_called_again(pair):
    connection = Connection(pair[0])
    connection.watch(Calls())
    connection.unwatch()
    connection.unwatch()


def test_a_connection_without_a_socket_is_never_noticed_to_leave():
    connection = Connection()
    connection.watch(Calls())
    connection.abort()
    connection.unwatch()
    assert not connection.is_gone


def test_a_closed_socket_is_no_longer_watched(pair):
    pair[0].close()
    connection = Connection(pair[0])
    connection.watch(Calls())
    connection.unwatch()
    connection.abort()


def test_abort_ends_a_write_that_is_stuck(pair):
    ours, _ = pair
    ended = Signal()

    def write():
        try:
            ours.sendall(bytes(100_000_000))
        except OSError:
            ended.set()

    thread = threading.Thread(target=write)
    thread.start()
    Connection(ours).abort()
    ended.wait()
    thread.join(10)


def test_the_server_s_socket_is_found_in_the_environ(pair):
    for name in ("gunicorn.socket", "werkzeug.socket"):
        calls = Calls()
        ours, theirs = socket.socketpair()
        with ours:
            connection = connection_of({name: ours, "SERVER_PROTOCOL": "HTTP/1.1"})
            connection.watch(calls)
            theirs.close()
            calls.came.wait()
            connection.unwatch()


def test_waitress_says_itself_whether_the_client_is_gone():
    gone = []
    connection = connection_of({"waitress.client_disconnected": lambda: bool(gone)})
    assert not connection.is_gone
    gone.append(True)
    assert connection.is_gone


def test_http_2_shares_its_socket_so_it_is_left_alone(pair):
    ours, _ = pair
    connection = connection_of({"gunicorn.socket": ours, "SERVER_PROTOCOL": "HTTP/2.0"})
    connection.abort()
    pair[1].send(b"still open")
    assert ours.recv(100) == b"still open"
