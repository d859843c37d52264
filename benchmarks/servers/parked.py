"""A WSGI app whose streams wait for ever: what gunicorn itself needs for one."""

from __future__ import annotations

from gevent.event import Event

never = Event()


def app(environ, start_response):  # noqa: ARG001
    start_response("200 OK", [("Content-Type", "text/event-stream")])
    return park()


def park():
    yield b"data: ~1~0~\n\n"
    never.wait()
