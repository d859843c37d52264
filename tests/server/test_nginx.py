"""Behind nginx, set up as the README says."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from pathlib import Path
from time import monotonic, sleep

import pytest

from .asking import EMIT_AND_WAIT, ask
from .wire import Client

README = (Path(__file__).parents[2] / "README.md").read_text()
NGINX = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")

pytestmark = pytest.mark.skipif(NGINX is None, reason="needs nginx: Debian package nginx-light")


@pytest.fixture(scope="module")
def upstream(servers):
    return servers("gevent")


@pytest.fixture(scope="module")
def nginx(upstream, tmp_path_factory):
    """The address of an nginx before the server, with the README's own location block."""
    folder = tmp_path_factory.mktemp("nginx")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (location,) = re.findall(r"```nginx\nlocation /v1/ (\{.*?\n\})\n```", README, re.DOTALL)
    location = location.replace("127.0.0.1:8000", "{}:{}".format(*upstream.address))
    (folder / "nginx.conf").write_text(
        f"""
        daemon off;
        worker_processes 1;
        pid {folder}/pid;
        error_log stderr;
        events {{ worker_connections 64; }}
        http {{
            access_log off;
            client_body_temp_path {folder}/body;
            proxy_temp_path {folder}/proxy;
            fastcgi_temp_path {folder}/fastcgi;
            uwsgi_temp_path {folder}/uwsgi;
            scgi_temp_path {folder}/scgi;
            server {{
                listen 127.0.0.1:{port};
                location / {location}
            }}
        }}
        """
    )
    process = subprocess.Popen(
        [NGINX, "-p", folder, "-e", "stderr", "-c", folder / "nginx.conf"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = ("127.0.0.1", port)
    try:
        until = monotonic() + 10
        while True:
            try:
                socket.create_connection(address).close()
                break
            except OSError:
                assert process.poll() is None, "nginx ended"
                assert monotonic() < until, "nginx does not listen"
                sleep(0.02)
        yield address
    finally:
        process.terminate()
        process.wait(10)


def test_tokens_pass_one_by_one(nginx, upstream):
    with Client(nginx) as client:
        id = ask(client, ["emit", "a "], ["gate"], ["emit", "b "])
        answer = client.answer()
        answer.read_until(b"a ")
        assert "b " not in answer.text
        upstream.control.open_gate(id)
        answer.read_all()
        assert answer.text.endswith("data: [DONE]\n\n")


def test_a_client_that_leaves_is_told_to_the_backend(nginx, upstream, measure):
    with Client(nginx) as client:
        id = ask(client, *EMIT_AND_WAIT)
        client.answer().read_until(b"a ")
        upstream.control.wait(id, "waiting")
    left = monotonic()
    event = upstream.control.wait(id, "cancelled")
    measure("disconnect to cancel, through nginx", "gevent", event["at"] - left)
    assert event["at"] - left < 0.5


def test_a_broken_stream_has_no_marker_at_its_end(nginx):
    with Client(nginx) as client:
        ask(client, ["emit", "a "], ["raise", "scripted"])
        answer = client.answer()
        answer.read_all()
        assert "engine_error" in answer.text
        assert "[DONE]" not in answer.text
