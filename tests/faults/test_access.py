"""Who has no key, a wrong one, or another one's."""

from __future__ import annotations

import json

import pytest
from server.asking import new_id

from flask_llmstream import config
from flask_llmstream.config import ApiKeys

from .conftest import KINDS
from .report import watching, what_was_seen

KEYS = {"ann": "the key of ann", "ben": "the key of ben"}
GATED = [["emit", "a "], ["gate"], ["emit", "b"]]


def send(client, method, path, key, body=b"", id=None):
    headers = {"X-Request-ID": id} if id else {}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    client.ask(method, path, headers=headers, body=body)


def answer_to(server, *question):
    with server.client() as client:
        send(client, *question)
        return client.answer().read_all()


def chat(id, steps):
    script = json.dumps({"id": id, "steps": steps})
    messages = [{"role": "user", "content": script}]
    return json.dumps({"model": "thread", "stream": True, "messages": messages}).encode()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_its_caller_s_alone(start, kind):
    server = start(kind, config={"LLMSTREAM_API_KEYS": KEYS})
    seen = []
    with watching("access: no key, a wrong one, another's stream", server) as fault:
        for key in ("", "the key of eve", KEYS["ann"] + "x"):
            refused = answer_to(server, "POST", "/v1/chat/completions", key, chat("x", []))
            assert (refused.status, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            seen.append(what_was_seen(refused))
        with server.client() as client:
            id = new_id()
            send(client, "POST", "/v1/chat/completions", KEYS["ann"], chat(id, GATED), id)
            answer = client.answer()
            answer.read_until(b"a ")
            for key, status in (("", 401), ("the key of eve", 401), (KEYS["ben"], 404)):
                refused = answer_to(server, "DELETE", f"/v1/streams/{id}", key)
                assert refused.status == status
                seen.append(what_was_seen(refused))
            # It went on, and ends as it would have.
            server.control.open_gate(id)
            assert answer.read_all().events()[-1] == "[DONE]"
        with server.client() as client:
            id = new_id()
            send(client, "POST", "/v1/chat/completions", KEYS["ann"], chat(id, GATED), id)
            answer = client.answer()
            answer.read_until(b"a ")
            assert answer_to(server, "DELETE", f"/v1/streams/{id}", KEYS["ann"]).status == 200
            assert b'"cancelled"' in answer.read_all().body
            server.control.open_gate(id)
            server.control.wait(id, "closed")
        fault.saw = "; ".join(dict.fromkeys(seen))
    assert server.control.events("x") == []


@pytest.mark.parametrize("given", ["first key", "last key", "no key of ours", "first key and more"])
def test_every_key_is_compared_whichever_was_given(monkeypatch, given):
    """The time that takes is not to be measured here; that nothing is left out is."""
    compared = []

    def compare_digest(one, other):
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr(config.hmac, "compare_digest", compare_digest)
    keys = ApiKeys({"first": "first key", "middle": "middle key", "last": "last key"})
    name, is_ours, _ = f"{given} ".partition(" key ")
    assert keys.name_of(given) == (name if is_ours and given.endswith(" key") else None)
    # Digests of one length, so that a key's own does not show, either.
    assert compared == [(32, 32)] * 3
