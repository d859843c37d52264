"""L1: bytes and text on the wire. Pure: no Flask, no gevent, no sockets."""

from .frames import FRAMINGS, JSON, NDJSON, SSE, TEXT, Framing

__all__ = ["FRAMINGS", "JSON", "NDJSON", "SSE", "TEXT", "Framing"]
