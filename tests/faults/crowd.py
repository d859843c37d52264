"""Thousands of clients in one thread: each asks once, reads to the end, and keeps the times."""

from __future__ import annotations

import json
import selectors
import socket
from contextlib import ExitStack
from itertools import count, islice, pairwise
from math import inf
from time import monotonic

from flask_llmstream.framing import ChunkedDecoder

from .report import seen_of

_numbers = count(1)


def question(model, *step, headers=(), **more):
    """A request for the script of the one *step*, whose connection ends with its answer."""
    id = f"visitor-{next(_numbers)}"
    body = json.dumps({"script": {"id": id, "steps": [step]}, "model": model, **more}).encode()
    lines = ["POST /stream HTTP/1.1", "Host: localhost", "Connection: close"]
    lines += [f"Content-Length: {len(body)}", "Content-Type: application/json"]
    lines += [f"{name}: {value}" for name, value in dict(headers).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Visitor:
    """
    One connection and its answer.

    Attributes:
        asked_at: When its question was sent.
        arrivals: When something came, after the head.
        ended_at: When its connection ended.
        status: 0 where nothing came.
        ending: ``complete``, or how the transfer broke off.
    """

    __slots__ = ("arrivals", "asked_at", "body", "ended_at", "ending", "headers", "raw", "status")

    def __init__(self):
        self.raw = bytearray()
        self.arrivals = []
        self.asked_at = self.ended_at = 0.0
        self.status, self.headers, self.body, self.ending = 0, {}, b"", "nothing"

    def take(self, data):
        self.raw += data
        self.arrivals.append(monotonic())

    def end(self, ending):
        self.ended_at = monotonic()
        self.ending = ending
        head, found, body = bytes(self.raw).partition(b"\r\n\r\n")
        self.raw = b""
        if not found:
            return
        status_line, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(status_line.split(" ")[1])
        self.headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
        if self.headers.get("transfer-encoding") == "chunked":
            decoder = ChunkedDecoder()
            self.body = b"".join(decoder.feed(body))
            is_whole = decoder.complete
        else:
            self.body = body
            is_whole = len(body) == int(self.headers.get("content-length", -1))
        self.ending = "complete" if is_whole else ending

    @property
    def is_whole(self):
        """It was answered to the end."""
        return self.status == 200 and self.ending == "complete" and b"data: [DONE]" in self.body

    @property
    def seconds(self):
        return self.ended_at - self.asked_at

    @property
    def gaps(self):
        """Pairs: when something came, and how long after what came before it."""
        return [(at, at - before) for before, at in pairwise(self.arrivals)]

    @property
    def seen(self):
        return seen_of(self.status, self.headers, self.body, self.ending)


def crowd(address, questions, *, at_once, per_second=inf, seconds=60.0, meanwhile=lambda: None):
    """
    Ask all *questions*, so many *at_once*, and wait for the end of every answer.

    Args:
        address: The server's.
        questions: As `question` makes them.
        at_once: How many connections are open, at most.
        per_second: How many are opened in a second, at most.
        seconds: How long it may take.
        meanwhile: Called between any two looks, about every 10 ms.
    """
    questions = iter(questions)
    visitors, begun_at = [], monotonic()
    until = begun_at + seconds
    with selectors.DefaultSelector() as selector, ExitStack() as stack:
        waiting = {}

        def begin(asked):
            sock = stack.enter_context(socket.socket())
            # Loopback: connecting is done at once, or waits for room in the backlog.
            sock.settimeout(10.0)
            sock.connect(address)
            visitor = waiting[sock] = Visitor()
            visitor.asked_at = monotonic()
            sock.sendall(asked)
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_READ)
            visitors.append(visitor)

        def finish(sock, ending):
            selector.unregister(sock)
            sock.close()
            waiting.pop(sock).end(ending)

        while True:
            due = (monotonic() - begun_at) * per_second + 1 - len(visitors)
            for asked in islice(questions, int(max(0, min(at_once - len(waiting), due)))):
                begin(asked)
            if not waiting:
                return visitors
            assert monotonic() < until, f"{len(waiting)} of {len(visitors)} have no whole answer"
            for key, _ in selector.select(0.01):
                ending = _read(key.fileobj, waiting[key.fileobj])
                if ending:
                    finish(key.fileobj, ending)
            meanwhile()


def _read(sock, visitor):
    """Take what there is; how the connection ended, where it has."""
    try:
        data = sock.recv(65536)
    except BlockingIOError:
        return ""
    except ConnectionError:
        return "reset"
    if not data:
        return "eof"
    visitor.take(data)
    return ""


def percentile(values, share):
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def in_ms(values):
    """Their p50, p99 and maximum, for the table."""
    return (
        f"p50 {percentile(values, 0.5) * 1000:.0f} ms, p99 {percentile(values, 0.99) * 1000:.0f} ms, "
        f"max {max(values) * 1000:.0f} ms"
    )
