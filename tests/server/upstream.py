"""A model server of its own process that streams: some words, each after a pause."""

from __future__ import annotations

import gevent
from gevent.pywsgi import WSGIServer

WORDS = 10
PAUSE_SECONDS = 0.1


def answer(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    for number in range(WORDS):
        gevent.sleep(PAUSE_SECONDS)
        yield f"{number} ".encode()


if __name__ == "__main__":
    server = WSGIServer(("127.0.0.1", 0), answer, log=None, backlog=1024)
    server.start()
    print(f"Listening at: http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
