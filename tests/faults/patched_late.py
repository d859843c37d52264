"""An app that has served on threads before its process is patched, and serves on greenlets then."""

from __future__ import annotations

from .app import create_app


def ask(client):
    """The app's own client, in a process without greenlets."""
    script = {"id": "before", "steps": [["emit", "a "], ["emit", "b"]]}
    response = client.post("/stream", json={"script": script, "model": "greenlet"})
    assert "[DONE]" in response.text, response.text


if __name__ == "__main__":
    app = create_app()
    ask(app.test_client())

    from gevent import monkey

    monkey.patch_all()
    from gevent.pywsgi import WSGIServer

    server = WSGIServer(("127.0.0.1", 0), app, log=None)
    server.start()
    print(f"Listening at: http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
