"""
Mixed load with faults on real servers, for as long as is asked: ``make soak SECONDS=300``.

Two dozen clients a server ask, leave, stall, come back and send nonsense, by seeded chance. Three
times the load pauses and the worker is looked at: once it is warm, half way, and at the end. It
fails where an answer was not what it had to be, where a request is in no place or two of
`llm.stats()`, or where more is held at the end than the bounds below allow.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread
from time import monotonic, sleep

from server.asking import ask
from server.control import Control
from server.test_slow_body import LENGTH, begin

from .baseline import EXACT, Baseline, check_books, wait_until_idle
from .conftest import fill, start_server

CLIENTS = 24
WARM_SHARE, LEAST_WARM_SECONDS = 0.15, 5.0
"""Of the whole time, before the first look."""
MOST_GROWTH_BYTES = 6 * 1024 * 1024
"""From the first look to the last one, whatever the length: allocators settle, leaks do not."""
LEFT = "left by the client"

actions = []
"""Pairs of a weight and what a client does: a function of its server and its chance."""


def happens(weight):
    def add(action):
        actions.append((weight, action))
        return action

    return add


def read(client, status=200):
    answer = client.answer().read_all()
    assert answer.status == status, (answer.status, answer.text[:300])
    assert answer.ending == "complete", answer.ending
    return answer


def read_whole(client, text):
    answer = read(client)
    assert answer.events()[-1] == "[DONE]", answer.text[-300:]
    assert answer.tokens() == text, answer.tokens()[:300]
    return "whole"


def read_error(client, code, status=200):
    """In-band, or by its status."""
    answer = read(client, status)
    error = answer.objects()[-1]["error"] if status == 200 else answer.json()["error"]
    assert error["code"] == code, error
    return code


def words(count):
    return "".join(f"{number} " for number in range(count))


# What goes well.


@happens(8)
def read_a_stream(server, chance):
    count = chance.randrange(1, 30)
    model = chance.choice(("thread", "greenlet", "single"))
    with server.client() as client:
        ask(client, *(["emit", f"{number} "] for number in range(count)), model=model)
        return read_whole(client, words(count))


@happens(4)
def read_from_a_batch(server, chance):
    count, every = chance.randrange(1, 12), chance.randrange(1, 4)
    with server.client() as client:
        ask(client, ["steps", count, every], model="steps")
        return read_whole(client, words(count))


@happens(3)
def read_a_document(server, chance):
    with server.client() as client:
        ask(client, ["emit", "a"], ["emit", "b"], stream=False)
        assert read(client).json()["text"] == "ab"
    return "whole"


@happens(2)
def ask_twice_on_a_connection(server, chance):
    with server.client() as client:
        for _ in range(2):
            ask(client, ["emit", "a"])
            read_whole(client, "a")
    return "whole"


@happens(2)
def come_back_for_the_rest(server, chance):
    with server.client() as client:
        id = ask(client, ["emit", "0 "], ["gate"], ["emit", "1 "], settings=RESUMABLE)
        answer = client.answer()
        answer.read_until(b'"0 "')
        stream_id = next(line[4:] for line in answer.text.split("\n") if line.startswith("id: "))
        chance.choice((client.close, client.reset))()
    server.control.open_gate(id)
    with server.client() as client:
        headers = {"Last-Event-ID": stream_id}
        ask(client, ["emit", "not this"], settings=RESUMABLE, headers=headers)
        answer = read(client)
        tokens = [line for line in answer.text.split("\n") if '"token":' in line]
        assert '"1 "' in tokens[0], answer.text
        assert answer.body.endswith(b"data: [DONE]\n\n"), answer.text
    return "whole"


RESUMABLE = {"resume_seconds": 2.0}


# Clients that leave.


@happens(5)
def leave_in_mid_stream(server, chance):
    model = chance.choice(("thread", "greenlet"))
    with server.client() as client:
        ask(client, ["emit", "a"], ["until_cancelled"], model=model)
        client.answer().read_until(b'"a"')
        chance.choice((client.close, client.reset))()
    return LEFT


@happens(5)
def leave_at_any_moment(server, chance):
    model = chance.choice(("thread", "single", "steps", "long-queue"))
    step = {"steps": ["steps", 10, 1], "long-queue": ["work", 0.02]}.get(model, ["emit", "a"])
    with server.client() as client:
        ask(client, step, model=model)
        sleep(chance.random() * 0.05)
        chance.choice((client.close, client.reset, client.half_close))()
        return LEFT


@happens(1)
def stall(server, chance):
    with server.client(receive_buffer=4096) as client:
        id = ask(client, ["flood", 100_000, 1000], settings={"slow_reader_seconds": 0.5})
        assert server.control.wait(id, "finished")["code"] == "slow_reader"
    return "slow_reader"


@happens(1)
def send_half_a_body(server, chance):
    with server.client() as client:
        begin(client, LENGTH, budget_seconds=0.3)
        client.send(b"{" * chance.randrange(100))
        return read_error(client, "deadline_exceeded", 504)


@happens(1)
def leave_in_the_body(server, chance):
    with server.client() as client:
        begin(client, LENGTH)
        chance.choice((client.close, client.reset))()
    return LEFT


# Nonsense.


@happens(1)
def ask_for_nothing_there_is(server, chance):
    body = b'{"model": "none", "messages": [{"role": "user", "content": "?"}]}'
    with server.client() as client:
        client.ask("POST", "/v1/chat/completions", body=body)
        return read_error(client, "model_not_found", 404)


@happens(1)
def send_no_json(server, chance):
    with server.client() as client:
        client.ask("POST", "/v1/chat/completions", body=b'{"model": ' * chance.randrange(1, 50))
        return read_error(client, "invalid_request", 400)


@happens(1)
def send_too_much(server, chance):
    with server.client() as client:
        try:
            client.ask("POST", "/v1/chat/completions", body=b" " * 1_200_000)
            return read_error(client, "request_too_large", 413)
        except ConnectionError:
            return "request_too_large"  # Answered before it was all sent.


# Backends that fail.


@happens(3)
def ask_what_fails(server, chance):
    how = chance.choice(("raises after a token", "exits", "yields an object", "yields bad bytes"))
    with server.client() as client:
        ask(client, [how], model=chance.choice(("wayward", "wayward-greenlet")))
        return read_error(client, "engine_error")


@happens(2)
def ask_what_calls_back_wrongly(server, chance):
    how = chance.choice(("fails twice", "emits an object"))
    with server.client() as client:
        ask(client, [how], model="callback")
        return read_error(client, "engine_error")


@happens(2)
def ask_what_calls_back_too_often(server, chance):
    how = chance.choice(("finishes twice", "calls after its finish"))
    with server.client() as client:
        ask(client, [how], model="callback")
        return read_whole(client, "a")


@happens(2)
def leave_what_calls_back_late(server, chance):
    with server.client() as client:
        ask(client, ["calls late"], model="callback")
        client.answer().read_until(b'"a"')
    return LEFT


@happens(2)
def ask_what_takes_too_long(server, chance):
    budget = chance.choice((0.001, 0.05, 0.2))
    with server.client() as client:
        ask(client, ["until_cancelled"], headers={"X-Request-Timeout": f"{budget}"})
        return read_error(client, "deadline_exceeded", 504)


@happens(2)
def ask_what_stops_in_the_middle(server, chance):
    with server.client() as client:
        ask(client, ["emit", "a"], ["until_cancelled"], settings={"idle_seconds": 0.1})
        return read_error(client, "idle_timeout")


@happens(1)
def ask_for_a_megabyte(server, chance):
    with server.client() as client:
        ask(client, ["is huge", 1_000_000], model="wayward")
        return read_whole(client, "a" + "x" * 1_000_000 + "b")


class Seat:
    """A server as one of its clients has it: with a control of its own."""

    def __init__(self, server):
        self.client = server.client
        self.control = Control(server.folder / f"{server.control.pid}.sock")


class Load:
    """
    The clients of one server.

    Attributes:
        outcomes: How often the clients saw what.
        unexpected: What was not as it had to be, the first few of each kind.
    """

    def __init__(self, server, seed):
        self.outcomes, self.unexpected = Counter(), Counter()
        self._server = server
        self._goes, self._is_over = Event(), Event()
        self._clients = [
            Thread(target=self._run, args=(Seat(server), random.Random(seed * 1000 + number)))
            for number in range(CLIENTS)
        ]
        self._busy = set()
        for client in self._clients:
            client.start()

    def _run(self, seat, chance):
        weights, functions = zip(*actions, strict=True)
        while not self._is_over.is_set():
            if not self._goes.wait(0.1):
                continue
            self._busy.add(chance)
            (action,) = chance.choices(functions, weights)
            try:
                self.outcomes[action(seat, chance)] += 1
            except Exception as error:
                self.unexpected[f"{action.__name__}: {type(error).__name__}: {error}"[:300]] += 1
            self._busy.discard(chance)
            sleep(chance.random() * 0.05)
        seat.control.close()

    def run(self, seconds):
        """Let the clients go for so long; then wait until the server is idle again."""
        self._goes.set()
        sleep(seconds)
        self._goes.clear()
        until = monotonic() + 30.0
        while self._busy:
            assert monotonic() < until, "a client has no answer"
            sleep(0.05)
        sleep(RESUMABLE["resume_seconds"] + 0.5)  # What nobody came back for is forgotten.
        wait_until_idle(self._server.control, seconds=30.0)
        return Baseline.of(self._server.control)

    def end(self):
        self._is_over.set()
        for client in self._clients:
            client.join()


def soak(kind, seconds, seed):
    """The looks at one server, and its load."""
    server = start_server(kind)
    try:
        fill(server)
        load = Load(server, seed)
        try:
            warm = max(LEAST_WARM_SECONDS, seconds * WARM_SHARE)
            rest = max(LEAST_WARM_SECONDS, seconds - warm) / 2
            looks = [load.run(each) for each in (warm, rest, rest)]
        finally:
            load.end()
        return looks, load
    finally:
        server.kill()


COLUMNS = ("server", "look", "memory, KiB", *EXACT, "accepted")


def rows_of(kind, looks):
    for name, look in zip(("start", "middle", "end"), looks, strict=True):
        figures = look.figures
        exact = [str(figures[each]) for each in EXACT]
        accepted = str(figures["stats"]["total"]["accepted"])
        yield (kind, name, str(figures["memory"] // 1024), *exact, accepted)


def complaints_about(kind, looks, load):
    start, _, end = looks
    for look in looks:
        check_books(look.figures["stats"])
    excess = end.excess(start, growth_bytes=MOST_GROWTH_BYTES)
    if excess:
        yield f"{kind} holds more than at the start: {excess}"
    for what, number in load.unexpected.most_common(10):
        yield f"{kind}: {number} times {what}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--kinds", nargs="+", default=["gevent", "hub"])
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with ThreadPoolExecutor(len(arguments.kinds)) as pool:
        running = {
            kind: pool.submit(soak, kind, arguments.seconds, arguments.seed)
            for kind in arguments.kinds
        }
        results = {kind: future.result() for kind, future in running.items()}
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for kind, (looks, _) in results.items():
        lines += rows_of(kind, looks)
    for cells in lines:
        print(f"| {' | '.join(cells)} |")
    for kind, (_, load) in results.items():
        seen = ", ".join(f"{number} {what}" for what, number in load.outcomes.most_common())
        print(f"\n{kind}, as the clients saw it: {seen}")
    complaints = [
        each
        for kind, (looks, load) in results.items()
        for each in complaints_about(kind, looks, load)
    ]
    print("", *complaints, sep="\n")
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
