"""Processor time of a gunicorn gevent worker per delivered token, with many slow streams."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
BODY = b'{"model":"steps","stream":true,"messages":[{"role":"user","content":"go"}]}'


class Steps:
    """One native thread that emits a token to every stream, 25 times a second."""

    max_concurrency = 10_000

    def __init__(self):
        self.emits = []
        self.is_started = False

    def submit(self, request, emit):  # noqa: ARG002
        self.emits.append(emit)
        if not self.is_started:
            self.is_started = True
            from flask_llmstream.core import runtime

            runtime.start_thread(self.run)
        return lambda: None

    def run(self):
        from flask_llmstream.core import runtime

        due = time.monotonic()
        while True:
            self.emits = [emit for emit in self.emits if emit(" token")]
            due += 0.04
            runtime.sleep(max(0.0, due - time.monotonic()))


def create_app():
    from flask import Flask

    from flask_llmstream import LLMStream

    app = Flask(__name__)
    llm = LLMStream(app)
    llm.add_backend("steps", Steps())
    app.register_blueprint(llm.openai_blueprint())
    return app


def processor_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


async def read_stream(port, counts, number):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
    )
    try:
        while data := await reader.read(65536):
            counts[number] += data.count(b'"content":" token"')
    finally:
        writer.close()


async def load(port, pid, streams, seconds):
    counts = [0] * streams
    tasks = [asyncio.create_task(read_stream(port, counts, number)) for number in range(streams)]
    while not all(counts):  # noqa: ASYNC110 - it only waits for the start
        await asyncio.sleep(0.2)
    await asyncio.sleep(1)
    tokens, used, begun = sum(counts), processor_seconds(pid), time.monotonic()
    await asyncio.sleep(seconds)
    tokens, used = sum(counts) - tokens, processor_seconds(pid) - used
    wall = time.monotonic() - begun
    print(
        f"{streams} streams: {used / tokens * 1e6:.1f} µs a token, {tokens / wall:.0f} tokens/s "
        f"of {streams * 25}, {used / wall:.0%} of a core"
    )
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, nargs="+", default=[600, 1200])
    parser.add_argument("--seconds", type=float, default=10)
    arguments = parser.parse_args()
    for streams in arguments.streams:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "gunicorn", "-k", "gevent", "--worker-connections", "5000"),
                *("-b", f"127.0.0.1:{port}", "--chdir", str(Path(__file__).parent)),
                *("--log-level", "error", "streams:create_app()"),
            ]
        )
        try:
            children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
            until = time.monotonic() + 20
            while not children.read_text().split() and time.monotonic() < until:
                time.sleep(0.1)
            time.sleep(2)
            asyncio.run(load(port, children.read_text().split()[0], streams, arguments.seconds))
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(20)


if __name__ == "__main__":
    main()
