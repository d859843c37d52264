"""A TCP proxy that breaks connections, at a chosen byte of their response or at once."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

WAIT_SECONDS = 10.0


class CuttingProxy:
    """
    Passes connections on to *url*.

    Attributes:
        cuts: For the next connections: how many bytes of the response get through. Without
            one a connection holds.
        resets: Whether a connection is broken by an RST; else by a FIN.
        connections: How many there were.
    """

    def __init__(self, url):
        parts = urlsplit(url)
        self._upstream = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open = {}
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.cuts = []
        self.resets = False
        self.connections = 0

    def run(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            cut = self.cuts.pop(0) if self.cuts else None
            thread = threading.Thread(target=self._pass_on, args=(client, cut), daemon=True)
            self._open[client] = thread
            thread.start()

    def _pass_on(self, client, cut):
        with client, socket.create_connection(self._upstream, WAIT_SECONDS) as server:
            sending = threading.Thread(target=_pump, args=(client, server, None), daemon=True)
            sending.start()
            _pump(server, client, cut)
            _shut(server)
            # Not while another thread reads from it: then a close would wait for that.
            _shut(client, socket.SHUT_RD)
            sending.join(WAIT_SECONDS)
            if self.resets and cut is not None:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        del self._open[client]

    def break_all(self):
        """Break every connection that is open now."""
        for client in tuple(self._open):
            _shut(client)

    def close(self):
        _shut(self._listener)
        self._listener.close()
        threads = tuple(self._open.values())
        self.break_all()
        for thread in threads:
            thread.join(WAIT_SECONDS)


def _pump(source, target, cut):
    """Pass on what comes, at most *cut* bytes of it."""
    passed = 0
    with suppress(OSError):
        while cut is None or passed < cut:
            data = source.recv(65536 if cut is None else cut - passed)
            if not data:
                return
            target.sendall(data)
            passed += len(data)


def _shut(end, how=socket.SHUT_RDWR):
    with suppress(OSError):
        end.shutdown(how)


@contextmanager
def cutting(url):
    """A `CuttingProxy` in front of *url*."""
    proxy = CuttingProxy(url)
    thread = threading.Thread(target=proxy.run, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.close()
        thread.join(WAIT_SECONDS)
