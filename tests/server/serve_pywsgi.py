"""gevent's own server, in a process that is not patched."""

from __future__ import annotations

import logging

from gevent.pywsgi import WSGIServer

from .app import create_app

logging.basicConfig()
server = WSGIServer(("127.0.0.1", 0), create_app())
server.start()
print(f"Listening at: http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
