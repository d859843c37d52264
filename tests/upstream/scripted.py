"""
An upstream of its own process that does as each request tells it.

It is several upstreams in one, by the first part of the path: ``/a/v1``, ``/b/v1``. What
each of them does is in the last message, as JSON: an object of scripts by the name's last
letter, or for ``any`` of them, and the request's ``id``, under which is recorded what
happened. The steps of a script:

    ["head", headers]            200, chunked; unless told otherwise ``text/event-stream``
    ["status", code, headers, body]   a whole answer
    ["text", text] ["event", object] ["finish", reason] ["done"]    one event, one chunk
    ["chunk", text]              anything as one chunk
    ["raw", text]                anything as it is, in latin-1
    ["end"]                      the last chunk: the connection is kept
    ["sleep", seconds]
    ["crowd", count]             wait until it has had that many requests at a time
    ["tokens", count, seconds]   that many numbered tokens, with pauses
    ["silent"]                   nothing more, until the peer leaves; recorded as "left"
    ["close"] ["reset"]          FIN, or RST
    ["deaf", seconds]            ignore that the peer leaves

A script ``["turns", script, script, …]`` is another one each time, the last one from then on.

``GET /peak/<name>`` is the most requests that it ever had at a time. ``GET /log/<id>`` waits
for *n* records (``?n=1``) and returns them.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import sys
from collections import Counter
from time import monotonic
from urllib.parse import parse_qs, urlsplit

WAIT_SECONDS = 10.0


class LeftError(Exception):
    """The connection is over."""


class Upstream:
    def __init__(self):
        self.log = {}
        self.turns = {}
        self.models = {}
        self.changed = asyncio.Condition()
        self.connections = 0
        self.active = Counter()
        self.peak = Counter()

    async def record(self, id, **what):
        self.log.setdefault(id, []).append({"at": monotonic(), **what})
        async with self.changed:
            self.changed.notify_all()

    async def serve(self, reader, writer):
        self.connections += 1
        number, served = self.connections, 0
        try:
            while True:
                try:
                    head = await reader.readuntil(b"\r\n\r\n")
                except (asyncio.IncompleteReadError, ConnectionError):
                    return
                line, *lines = head.decode("latin-1").split("\r\n")
                method, target, _ = line.split(" ")
                headers = dict(each.lower().split(": ", 1) for each in lines if each)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                served += 1
                exchange = Exchange(self, reader, writer)
                if method == "POST":
                    await exchange.play(
                        target, headers, json.loads(body), connection=number, served=served
                    )
                else:
                    await exchange.look(target)
        except (LeftError, ConnectionError):
            pass
        finally:
            writer.close()


class Exchange:
    def __init__(self, upstream, reader, writer):
        self.upstream = upstream
        self.reader = reader
        self.writer = writer

    async def look(self, target):
        url = urlsplit(target)
        if url.path.endswith("/models"):
            name = url.path.split("/")[1]
            ids = self.upstream.models.get(name, [name + "-model", "shared-model"])
            await self.status(200, {}, json.dumps({"data": [{"id": id} for id in ids]}))
            return
        if url.path.startswith("/peak/"):
            peak = self.upstream.peak[url.path.removeprefix("/peak/")]
            await self.status(200, {}, json.dumps(peak))
            return
        query = parse_qs(url.query)
        if url.path == "/set-models":
            self.upstream.models = query
            await self.status(200, {}, "{}")
            return
        id, count = url.path.rpartition("/")[2], int(query.get("n", ["1"])[0])
        log = self.upstream.log.setdefault(id, [])

        async def wait():
            async with self.upstream.changed:
                await self.upstream.changed.wait_for(lambda: len(log) >= count)

        try:
            await asyncio.wait_for(wait(), WAIT_SECONDS)
        except asyncio.TimeoutError:
            pass
        await self.status(200, {}, json.dumps(log))

    async def play(self, target, headers, asked, **of_connection):
        name = target.split("/")[1]
        told = json.loads(asked["messages"][-1]["content"])
        self.id = told["id"]
        await self.upstream.record(
            self.id,
            name="asked",
            upstream=name,
            target=target,
            headers=headers,
            body=asked,
            **of_connection,
        )
        steps = told[name[-1]] if name[-1] in told else told["any"]
        if steps and steps[0] == "turns":
            turn = self.upstream.turns.get((self.id, name), 0)
            self.upstream.turns[self.id, name] = turn + 1
            steps = steps[1 + min(turn, len(steps) - 2)]
        self.choice = {"index": 0, "delta": {}, "finish_reason": None}
        self.name = name
        upstream = self.upstream
        upstream.active[name] += 1
        upstream.peak[name] = max(upstream.peak[name], upstream.active[name])
        async with upstream.changed:
            upstream.changed.notify_all()
        try:
            for verb, *arguments in steps:
                await getattr(self, verb)(*arguments)
                await self.writer.drain()
        finally:
            upstream.active[name] -= 1

    async def head(self, headers=None):
        headers = {
            "Content-Type": "text/event-stream",
            "Transfer-Encoding": "chunked",
            **(headers or {}),
        }
        lines = [f"{name}: {value}" for name, value in headers.items()]
        await self.raw("\r\n".join(["HTTP/1.1 200 OK", *lines, "", ""]))

    async def status(self, code, headers, body):
        body = body.encode()
        headers = {
            "Content-Type": "application/json",
            **headers,
            "Content-Length": len(body),
        }
        lines = [f"{name}: {value}" for name, value in headers.items()]
        await self.raw("\r\n".join([f"HTTP/1.1 {code} Told", *lines, "", ""]))
        self.writer.write(body)

    async def raw(self, text):
        self.writer.write(text.encode("latin-1"))

    async def chunk(self, text):
        data = text.encode()
        self.writer.write(b"%x\r\n%s\r\n" % (len(data), data))

    async def event(self, event):
        await self.chunk(f"data: {json.dumps(event)}\n\n")

    async def text(self, text):
        await self.event({"choices": [{**self.choice, "delta": {"content": text}}]})

    async def finish(self, reason="stop"):
        await self.event({"choices": [{**self.choice, "finish_reason": reason}]})

    async def done(self):
        await self.chunk("data: [DONE]\n\n")

    async def end(self):
        await self.raw("0\r\n\r\n")

    async def sleep(self, seconds):
        await asyncio.sleep(seconds)

    async def crowd(self, count):
        peak, changed = self.upstream.peak, self.upstream.changed
        async with changed:
            await changed.wait_for(lambda: peak[self.name] >= count)

    async def tokens(self, count, seconds):
        for number in range(count):
            await self.text(f"{number} ")
            await self.writer.drain()
            await asyncio.sleep(seconds)

    async def silent(self):
        try:
            await self.reader.read()
        except ConnectionError:
            pass
        await self.upstream.record(self.id, name="left")
        raise LeftError

    async def deaf(self, seconds):
        self.reader._transport.pause_reading()
        await asyncio.sleep(seconds)
        raise LeftError

    async def close(self):
        raise LeftError

    async def reset(self):
        await self.writer.drain()
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
        raise LeftError


async def main(certificate=None):
    context = None
    if certificate is not None:
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
    server = await asyncio.start_server(
        Upstream().serve, "127.0.0.1", 0, backlog=4096, limit=2**24, ssl=context
    )
    port = server.sockets[0].getsockname()[1]
    print(f"Listening at: http://127.0.0.1:{port}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
