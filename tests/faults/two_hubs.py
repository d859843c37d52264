"""Two gevent hubs, each on a native thread and with a server of its own, for one app."""

from __future__ import annotations

from flask_llmstream.core import runtime

from .app import create_app


def serve(app, ports):
    from gevent.pywsgi import WSGIServer

    server = WSGIServer(("127.0.0.1", 0), app, log=None)
    server.start()
    ports.append(server.server_port)
    server.serve_forever()


if __name__ == "__main__":
    app, ports = create_app(), []
    for _ in range(2):
        runtime.start_thread(lambda: serve(app, ports))
    while len(ports) < 2:
        runtime.sleep(0.01)
    print(f"The other: {ports[1]}", flush=True)
    print(f"Listening at: http://127.0.0.1:{ports[0]}", flush=True)
    while True:
        runtime.sleep(3600)
