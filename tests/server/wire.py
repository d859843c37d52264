"""An HTTP/1.1 client that hides nothing: chunks, EOF, RST, and when each byte came."""

from __future__ import annotations

import json
import socket
import struct
from time import monotonic

from flask_llmstream.framing import ChunkedDecoder

DEADLINE_SECONDS = 15.0


class Client:
    """
    One connection. Every wait ends after `DEADLINE_SECONDS`, with TimeoutError.

    Args:
        receive_buffer: Bytes that the kernel keeps for us: small for a client that does
            not read; None is the kernel's own choice.
    """

    def __init__(self, address, *, receive_buffer=None):
        is_unix = isinstance(address, str)
        self._socket = socket.socket(socket.AF_UNIX if is_unix else socket.AF_INET)
        if receive_buffer is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.settimeout(DEADLINE_SECONDS)
        self._socket.connect(address)
        self._unread = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._socket.close()

    # Talking.

    def send(self, data):
        self._socket.sendall(data)

    def ask(self, method, path, *, headers=(), body=b"", version="1.1"):
        """Send a request; *headers* are pairs or a dict."""
        lines = [f"{method} {path} HTTP/{version}", "Host: localhost"]
        lines += [f"{name}: {value}" for name, value in dict(headers).items()]
        if body or method == "POST":
            lines.append(f"Content-Length: {len(body)}")
        self.send("\r\n".join([*lines, "", ""]).encode() + body)

    # Leaving.

    def close(self):
        """FIN; a later write of the server is answered with RST. Returns when."""
        at = monotonic()
        self._socket.close()
        return at

    def reset(self):
        """RST. Returns when."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return self.close()

    def half_close(self):
        """FIN, and go on reading. Returns when."""
        at = monotonic()
        self._socket.shutdown(socket.SHUT_WR)
        return at

    # Listening.

    def receive(self):
        """Some bytes; b"" at EOF. Raises ConnectionError on RST."""
        if self._unread:
            data, self._unread = self._unread, b""
            return data
        return self._socket.recv(65536)

    def answer(self, *, has_body=True):
        """The next response, up to its head; *has_body* is False for a HEAD's."""
        head = b""
        while b"\r\n\r\n" not in head:
            data = self.receive()
            if not data:
                raise ConnectionError(f"EOF before the end of the head: {head!r}")
            head += data
        head, _, self._unread = head.partition(b"\r\n\r\n")
        return Answer(self, head.decode("latin-1"), has_body=has_body)

    def is_at_eof(self):
        """Whether the server has closed: waits for its next byte, or for that."""
        try:
            data = self.receive()
        except ConnectionError:
            return True
        self._unread = data
        return not data

    def give_back(self, data):
        self._unread = data + self._unread


class Answer:
    """
    A response under way.

    Attributes:
        pieces: What of the body has come, with the time of each.
        ending: How the body ended: ``complete`` (the last chunk, or as long as declared),
            ``eof`` or ``reset``; None while it has not.
    """

    def __init__(self, client, head, *, has_body):
        self.at = monotonic()
        status_line, *lines = head.split("\r\n")
        self.version, status, *_ = status_line.split(" ")
        self.status = int(status)
        self.fields = [tuple(line.split(": ", 1)) for line in lines]
        self.headers = {name.lower(): value for name, value in self.fields}
        self.pieces = []
        self.ending = None
        self.raw = bytearray()
        self._client = client
        self._decoder = None
        self._bytes_left = None if has_body else 0
        if not has_body:
            return
        if self.headers.get("transfer-encoding") == "chunked":
            self._decoder = ChunkedDecoder()
        elif "content-length" in self.headers:
            self._bytes_left = int(self.headers["content-length"])

    @property
    def body(self):
        return b"".join(data for data, _ in self.pieces)

    @property
    def text(self):
        return self.body.decode()

    def json(self):
        return json.loads(self.body)

    def events(self):
        """The SSE payloads so far; comments are left out."""
        whole = self.body[: self.body.rfind(b"\n\n") + 2]
        frames = whole.decode().split("\n\n")
        return [frame.removeprefix("data: ") for frame in frames if frame.startswith("data: ")]

    def objects(self):
        """The JSON of the SSE events so far, `[DONE]` left out."""
        return [json.loads(event) for event in self.events() if event != "[DONE]"]

    def tokens(self):
        """The text of the native dialect's SSE events so far."""
        return "".join(event.get("token", "") for event in self.objects())

    def read(self):
        """Wait for more of the body; False once it has ended."""
        if self.ending is not None:
            return False
        if self._bytes_left == 0:
            self.ending = "complete"
            return False
        try:
            data = self._client.receive()
        except ConnectionError:
            self.ending = "reset"
            return False
        if not data:
            self.ending = "eof"
            return False
        self.raw += data
        self._take(data)
        return True

    def _take(self, data):
        at = monotonic()
        if self._decoder is not None:
            self.pieces += [(piece, at) for piece in self._decoder.feed(data)]
            if self._decoder.complete:
                self.ending = "complete"
                self._client.give_back(self._decoder.unused_data)
        elif self._bytes_left is not None:
            mine, rest = data[: self._bytes_left], data[self._bytes_left :]
            self._bytes_left -= len(mine)
            self.pieces.append((mine, at))
            self._client.give_back(rest)
            if not self._bytes_left:
                self.ending = "complete"
        else:
            self.pieces.append((data, at))

    def read_until(self, marker):
        """Read until the body holds *marker*; returns when it came."""
        while marker not in self.body:
            assert self.read(), f"{self.ending} before {marker!r}: {self.status} {self.body!r}"
        return self.pieces[-1][1]

    def read_all(self):
        """Read to the end; returns itself."""
        while self.read():
            pass
        return self
