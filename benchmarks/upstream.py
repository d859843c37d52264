"""What a model behind HTTP costs: time to first token, processor time, memory, leaving."""

from __future__ import annotations

import sys

if "--direct" in sys.argv:
    from gevent import monkey

    monkey.patch_all()

import asyncio
import json
import os
import socket
import subprocess
import time
from pathlib import Path
from statistics import median

TICKS = os.sysconf("SC_CLK_TCK")
STREAMS = 1000
PAUSE_SECONDS = 0.2
WINDOW_SECONDS = 10
TOKEN = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"m"'
    b',"choices":[{"index":0,"delta":{"content":" token"},"logprobs":null,"finish_reason":null}]}'
    b"\n\n"
)
DONE = b"data: [DONE]\n\n"
BODY = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"%s"}]}'


# The upstream: a token at once, then one each pause, until the client leaves.


async def answer(reader, writer):
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
            body = await reader.readexactly(length)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n")
            writer.write(b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(TOKEN), TOKEN))
            if b"once" in body:
                writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(DONE), DONE))
                continue
            leaving = asyncio.ensure_future(reader.read())
            while not leaving.done():
                await asyncio.wait([leaving], timeout=PAUSE_SECONDS)
                if not leaving.done() and b"silent" not in body:
                    writer.write(b"%x\r\n%s\r\n" % (len(TOKEN), TOKEN))
            leaving.exception()  # A reset is as good as an end.
            if b"silent" in body:
                print(time.monotonic(), flush=True)
            return
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def serve_upstream(port):
    server = await asyncio.start_server(answer, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


# In front of it: this package, or the same client without it.


def create_app():
    from flask import Flask

    from flask_llmstream import LLMStream, UpstreamBackend

    app = Flask(__name__)
    llm = LLMStream(app)
    llm.add_backend("m", UpstreamBackend(os.environ["UPSTREAM"]), worker_threads=2 * STREAMS)
    app.register_blueprint(llm.openai_blueprint())
    return app


def call_directly(url):
    """A process of its own that reads the streams with the client and the `StreamReader`."""
    import gevent
    import httpx2

    from flask_llmstream import StreamReader

    client = httpx2.Client(limits=httpx2.Limits(max_connections=None), timeout=60)
    counts = [0] * STREAMS

    def read(number):
        with client.stream("POST", url, content=BODY % b"go") as response:
            for event in StreamReader(response.iter_raw()):
                json.loads(event.data)["choices"][0]["delta"]["content"]
                counts[number] += 1

    before = memory("self")
    for number in range(STREAMS):
        gevent.spawn(read, number)
    while not all(counts):
        gevent.sleep(0.2)
    gevent.sleep(1)
    tokens, used = sum(counts), time.process_time()
    gevent.sleep(WINDOW_SECONDS)
    tokens, used = sum(counts) - tokens, time.process_time() - used
    report("the client alone", used / tokens, memory("self") - before)
    os._exit(0)


# Measuring.


def memory(pid):
    """Private bytes of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def processor_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def report(who, seconds, more_bytes):
    print(
        f"{STREAMS} streams, {who}: {seconds * 1e6:.0f} µs of processor time a token, "
        f"{more_bytes / STREAMS / 1024:.1f} KiB a stream",
        flush=True,
    )


async def ask(port, what):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = BODY % what
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    return reader, writer


async def first_token(port, rounds):
    """Seconds to the first token: the median, one request at a time."""
    waits = []
    for _ in range(rounds):
        begun = time.perf_counter()
        reader, writer = await ask(port, b"once")
        data = b""
        while b" token" not in data:
            data += await reader.read(65536)
        waits.append(time.perf_counter() - begun)
        writer.close()
    return median(waits)


async def leave(port, upstream, rounds):
    """Seconds from a client's leaving to the close of the upstream's connection: the median."""
    waits = []
    for _ in range(rounds):
        reader, writer = await ask(port, b"silent")
        while b" token" not in await reader.read(65536):
            pass
        left_at = time.monotonic()
        writer.close()
        line = await asyncio.get_running_loop().run_in_executor(None, upstream.stdout.readline)
        waits.append(float(line) - left_at)
    return median(waits), max(waits)


async def load(port, pid):
    counts = [0] * STREAMS

    async def read(number):
        reader, writer = await ask(port, b"go")
        try:
            while data := await reader.read(65536):
                counts[number] += data.count(b'"content":" token"')
        finally:
            writer.close()

    before = memory(pid)
    tasks = [asyncio.create_task(read(number)) for number in range(STREAMS)]
    while not all(counts):  # noqa: ASYNC110 - nothing tells of the last one
        await asyncio.sleep(0.2)
    await asyncio.sleep(1)
    tokens, used = sum(counts), processor_seconds(pid)
    await asyncio.sleep(WINDOW_SECONDS)
    tokens, used = sum(counts) - tokens, processor_seconds(pid) - used
    report("through this package", used / tokens, memory(pid) - before)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def weigh_verbatim():
    """What a token costs to be parsed and rendered, against a rewrite of its bytes."""
    from flask_llmstream import InferenceRequest
    from flask_llmstream.backends.upstream_chat import read_chunk
    from flask_llmstream.client import StreamReader
    from flask_llmstream.core.assembly import Assembler
    from flask_llmstream.dialects import OpenAIChatDialect, Parsed
    from flask_llmstream.framing import SSE

    request = InferenceRequest(prompt="x", model="m", request_id="r")
    render = OpenAIChatDialect().renderer(Parsed(request), SSE).render
    accept = Assembler(request).accept
    rounds = 100_000
    begun = time.process_time()
    *_, data = [event.data for event in StreamReader([TOKEN] * rounds + [DONE])]
    reading = (time.process_time() - begun) / rounds
    begun = time.process_time()
    for _ in range(rounds):
        for item in read_chunk(data):
            for each in accept(item):
                render(each)
    parsing = (time.process_time() - begun) / rounds
    begun = time.process_time()
    for _ in range(rounds):
        # Finish, usage and errors have to be seen, tokens to be counted and kept.
        if '"finish_reason":null' in data and '"usage"' not in data and '"error"' not in data:
            text = data.partition('"content":"')[2].partition('"},"logprobs"')[0]
            data.replace('"id":"chatcmpl-1"', '"id":"chatcmpl-r"', 1).replace(
                '"model":"m"', '"model":"mine"', 1
            ).encode()
            accept(text)
    verbatim = (time.process_time() - begun) / rounds
    print(
        f"a token: {reading * 1e6:.1f} µs to split into events; {parsing * 1e6:.1f} µs to parse, "
        f"assemble and render, {verbatim * 1e6:.1f} µs to rewrite verbatim"
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main():
    port, upstream_port = free_port(), free_port()
    url = f"http://127.0.0.1:{upstream_port}/v1"
    me = [sys.executable, __file__]
    upstream = subprocess.Popen(
        [*me, "--upstream", str(upstream_port)], stdout=subprocess.PIPE, text=True
    )
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "gunicorn", "-k", "gevent", "--worker-connections", "5000"),
            *("-b", f"127.0.0.1:{port}", "--chdir", str(Path(__file__).parent)),
            *("--log-level", "error", "upstream:create_app()"),
        ],
        env={**os.environ, "UPSTREAM": url},
    )
    try:
        time.sleep(3)
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
        pid = children.read_text().split()[0]
        asyncio.run(first_token(port, 20))
        direct, through = [], []
        for _ in range(5):
            direct.append(asyncio.run(first_token(upstream_port, 100)))
            through.append(asyncio.run(first_token(port, 100)))
        print(
            f"first token: {median(through) * 1e3:.2f} ms, directly {median(direct) * 1e3:.2f} ms"
        )
        p50, worst = asyncio.run(leave(port, upstream, 50))
        print(f"leave to close: p50 {p50 * 1e3:.1f} ms, max {worst * 1e3:.1f} ms")
        asyncio.run(load(port, pid))
        subprocess.run([*me, "--direct", f"{url}/chat/completions"], check=True)
        weigh_verbatim()
    finally:
        server.terminate()
        upstream.terminate()
        server.wait(40)


if __name__ == "__main__":
    if "--upstream" in sys.argv:
        asyncio.run(serve_upstream(int(sys.argv[-1])))
    elif "--direct" in sys.argv:
        call_directly(sys.argv[-1])
    else:
        main()
