"""Processes with two hubs, patched late, and one app in one server after the other."""

from __future__ import annotations

import re
import sys
from contextlib import ExitStack

import pytest
from server.asking import EMIT_AND_WAIT, ask
from server.control import Control
from server.process import Process
from server.wire import Client

from .app import create_app
from .conftest import size
from .report import watching, what_was_seen

GATED = (["emit", "a "], ["gate"], ["emit", "b"])


class World(Process):
    """A process with the app, that is no server of the usual kinds."""

    def __init__(self, kind, command):
        self.kind = kind
        self.control = None
        super().__init__(command)

    def client(self, port=None):
        return Client((self.address[0], port or self.address[1]))

    def meet(self):
        """After the first request, which starts the listener."""
        with self.client() as client:
            ask(client, ["emit", "a"])
            assert client.answer().read_all().tokens() == "a"
        (path,) = self.folder.glob("*.sock")
        self.control = Control(path)

    def kill(self):
        if self.control is not None:
            self.control.close()
        super().kill()


@pytest.fixture
def begin():
    with ExitStack() as stack:

        def begin(kind, *command):
            world = World(kind, [sys.executable, "-m", *command])
            stack.callback(world.kill)
            world.meet()
            return world

        yield begin


def test_two_hubs_in_one_process(begin):
    """Streams of both at once; a client of one that leaves, and one that goes on."""
    world = begin("two hubs", "faults.two_hubs")
    ports = [world.address[1], int(re.search(r"The other: (\d+)", world.log)[1])]
    with watching("worlds: two hubs", world, ignoring=("threads", "greenlets", "files")) as fault:
        for leaves, stays in (ports, reversed(ports)):
            with world.client(leaves) as leaving, world.client(stays) as staying:
                left_id = ask(leaving, *EMIT_AND_WAIT)
                id = ask(staying, *GATED)
                answer = staying.answer()
                answer.read_until(b'"a "')
                leaving.answer().read_until(b'"a "')
                world.control.wait(left_id, "waiting")
                fault.told(left_id, leaving.close())
                world.control.open_gate(id)
                assert answer.read_all().tokens() == "a b"
        with world.client(ports[1]) as client:
            id = ask(client, ["gate"], headers={"X-Request-Timeout": "0.2"})
            assert client.answer().read_all().status == 504
            world.control.open_gate(id)
        fault.saw = what_was_seen(answer)


@pytest.mark.parametrize("model", [pytest.param("thread", marks=pytest.mark.full), "greenlet"])
def test_monkey_patching_late(begin, model):
    """The engine of *model* began with native threads where it now has greenlets."""
    world = begin("patched late", "faults.patched_late")
    with watching(f"worlds: patched late ({model})", world, ignoring=("threads",)) as fault:
        with world.client() as client:
            id = ask(client, *GATED, model=model)
            answer = client.answer()
            answer.read_until(b'"a "')
            world.control.open_gate(id)
            assert answer.read_all().tokens() == "a b"
        with world.client() as client:
            id = ask(client, *EMIT_AND_WAIT, model=model)
            client.answer().read_until(b'"a "')
            world.control.wait(id, "waiting")
            fault.told(id, client.reset())
        with world.client() as client:
            id = ask(client, ["gate"], model=model, headers={"X-Request-Timeout": "0.2"})
            assert client.answer().read_all().status == 504
            world.control.open_gate(id)
        fault.saw = what_was_seen(answer)


def test_one_app_in_one_server_after_the_other(tmp_path, monkeypatch, start_cold):
    """pytest's client, `flask run`, gunicorn's: each gives the same answer."""
    monkeypatch.setenv("SERVER_TEST_CONTROL", str(tmp_path))
    script = {"id": "any", "steps": [["emit", "a "], ["emit", "b"]]}
    headers = {"X-Request-ID": "one-and-the-same"}
    answers = {}
    client = create_app().test_client()
    answers["client"] = client.post("/stream", json={"script": script}, headers=headers).text
    for kind in ("werkzeug", "gevent", *size((), ("hub", "gthread"))):
        server = start_cold(kind)
        with server.client() as client:
            ask(client, *script["steps"], headers=headers)
            answers[kind] = client.answer().read_all().text
    assert answers["client"].endswith("data: [DONE]\n\n")
    assert set(answers.values()) == {answers["client"]}
