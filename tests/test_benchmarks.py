"""The benchmarks run, and their load notices what it is there to notice."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import threading
from contextlib import contextmanager
from xml.etree import ElementTree as ET

import pytest

if sys.platform != "linux":
    pytest.skip("they read /proc, and pin processes", allow_module_level=True)

from benchmarks import document, machine, plot, results, tables
from benchmarks import lab as labs
from benchmarks.figures import at_least, at_most
from benchmarks.lab import Lab, Server, chat_body
from benchmarks.measurements import answers, dispatch, knee, memory, streams
from benchmarks.programs import BenchmarkError, compile_programs, run_program
from benchmarks.servers import KINDS, Kind

STREAMS = 20


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler named cc")
    folder = tmp_path_factory.mktemp("programs")
    compile_programs(folder)
    return folder


@pytest.fixture
def lab(programs, monkeypatch):
    """One short round."""
    monkeypatch.setattr(labs, "STREAMS_WARM_UP_SECONDS", 0.1)
    monkeypatch.setattr(labs, "ANSWERS_WARM_UP_SECONDS", 0.1)
    return Lab(programs, rounds=1, seconds=0.4, streams=(STREAMS,))


@contextmanager
def answering(*parts):
    """A server that sends its only client these *parts* and hangs up; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.recv(65536)
                for part in parts:
                    connection.sendall(part)
                connection.recv(1)  # Until the client leaves.

        thread = threading.Thread(target=answer)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(10)
        assert not thread.is_alive()


def load_one(programs, *parts):
    """What the load saw of one stream of these *parts*, in its last line."""
    with answering(*parts) as port:
        *_, last = run_program(programs / "load", port, "/", "{}", 1, 0.1, 0.1, 0)
    return last


class TestLoad:
    def test_finds_no_gap_in_tokens_that_come_in_pieces_and_together(self, programs):
        found = load_one(programs, b"head ~1~", b"5~ and ~2~7~~3~9", b"~ tail")
        assert (found["gaps"], found["malformed"], found["lost"]) == (0, 0, 0)

    @pytest.mark.parametrize(
        "tokens", [b"~1~5~~3~5~", b"~1~5~~1~5~", b"~2~5~~1~5~"], ids=["lost", "twice", "swapped"]
    )
    def test_finds_a_token_that_is_not_the_next(self, programs, tokens):
        assert load_one(programs, tokens)["gaps"] == 1

    def test_finds_a_token_that_is_broken(self, programs):
        assert load_one(programs, b"~1~5~", b"~2~oops")["malformed"] == 1

    def test_says_that_a_stream_never_began(self, programs):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]

            def hang_up():
                listener.accept()[0].close()

            thread = threading.Thread(target=hang_up)
            thread.start()
            found = list(run_program(programs / "load", port, "/", "{}", 1, 0, 0.1, 0))
            thread.join(10)
        assert [each["started"] for each in found] == [0]
        assert not streams.is_complete(found[0])

    def test_reports_what_keeps_it_from_connecting(self, programs):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        with pytest.raises(BenchmarkError, match="connect"):
            list(run_program(programs / "load", port, "/", "{}", 1, 0, 0.1, 0))


@pytest.mark.parametrize("name", ["limit", "ours-worker", "ours-gevent", "flask-generator"])
def test_a_server_streams_every_token(lab, name):
    with lab.serving(name) as server:
        run = lab.load(server, STREAMS)
    assert streams.is_complete(run)
    assert run["microseconds_per_token"] > 0


def test_a_server_that_does_not_start_says_why(programs):
    kind = Kind("broken", lambda port, programs: ["sh", "-c", "echo no luck"])
    with pytest.raises(BenchmarkError, match="no luck"):
        Server(kind, programs, {})


def test_answers_are_measured_against_the_same_bytes(lab):
    body = chat_body("instant")
    with (
        lab.serving("ours-worker") as ours,
        answers.plain_server(lab, "worker", ours, body) as plain,
    ):
        runs = [
            {"who": who, "worker": "worker", "stream": True, **lab.request(server, body)}
            for who, server in (("ours", ours), ("plain", plain))
        ]
    assert all(run["requests"] > 0 and run["p50_ms"] > 0 for run in runs)
    assert runs[0]["first_p50_ms"] <= runs[0]["p50_ms"]


@pytest.mark.parametrize("name", ["ours-worker", "parked"])
def test_idle_streams_are_held_and_weighed(lab, name):
    run = memory.hold(lab, name, STREAMS, 0.1)
    assert (run["started"], run["lost"], run["tokens"]) == (STREAMS, 0, 0)
    assert run["private"] > 0


def test_dispatch_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "REQUESTS", 20)
    monkeypatch.setattr(dispatch, "TOKENS", 100)
    dispatch.main()
    found = json.loads(capsys.readouterr().out)
    runs = [{"submitter": kind, "round": 0, **found} for kind in dispatch.KINDS]
    assert len(dispatch.rows(runs)) == 8


@pytest.mark.parametrize("most", [0, 19, 100, 801, 1000, 5000, 20_000])
def test_the_knee_is_found_from_above_and_below(most):
    found = knee.find_knee(knee.BEGIN, lambda count: count <= most)
    assert found <= most
    assert found >= 0.9 * min(most, knee.MOST / knee.GROWTH) - 1


def run_of(server, count, *, cost=10.0, round=0, **more):
    run = {
        "server": server,
        "round": round,
        "streams": count,
        "started": count,
        "lost": 0,
        "seconds": 5.0,
        "gaps": 0,
        "malformed": 0,
        "fewest_tokens": 125,
        "tokens_per_second": count * 25,
        "tokens_per_read": 1.0,
        "microseconds_per_token": cost,
        "others_share": 0.01,
        "p50_ms": 2.0,
        "p99_ms": 9.0,
    }
    return {**run, **more}


def rows_of(runs):
    return {row.what: row for row in streams.rows(runs)}


def test_ratios_are_of_one_round_and_the_median_decides():
    runs = []
    for number, (limit, ours) in enumerate([(4.0, 6.0), (8.0, 12.0), (4.0, 40.0)]):
        runs.append(run_of("limit", 600, cost=limit, round=number))
        runs.append(run_of("ours-worker", 600, cost=ours, round=number))
    (row,) = (row for what, row in rows_of(runs).items() if what.startswith("CPU"))
    assert row.measured == "1.50 (1.50 to 10.0) ×"  # noqa: RUF001
    assert row.verdict == "hit"


@pytest.mark.parametrize(
    ("flaw", "verdict"),
    [
        ({}, "hit"),
        ({"gaps": 1}, "missed"),
        ({"lost": 1}, "missed"),
        ({"fewest_tokens": 0}, "missed"),
    ],
)
def test_an_overload_that_costs_a_token_is_a_miss(flaw, verdict):
    rows = rows_of([run_of("ours-worker", streams.OVERLOAD, **flaw)])
    (row,) = (row for what, row in rows.items() if "every token" in what)
    assert row.verdict == verdict


def test_tokens_that_get_fewer_under_load_are_a_miss():
    runs = [
        run_of("ours-worker", 600),
        run_of("ours-worker", 1200, tokens_per_second=14_000),
    ]
    (row,) = (row for what, row in rows_of(runs).items() if "growing" in what)
    assert (row.measured, row.verdict) == ("15,000 → 14,000", "missed")


def test_targets_hold_at_their_value():
    assert at_most("it", [2.0], 2).is_hit
    assert not at_most("it", [2.01], 2).is_hit
    assert at_least("it", [3.0], 3).is_hit
    assert not at_least("it", [2.99], 3).is_hit


def test_results_become_a_page_and_a_plot(tmp_path, monkeypatch):
    runs = [run_of(name, count) for name in plot.COLORS for count in (600, 1200)]
    unbegun = {"server": "flask-generator", "round": 0, "streams": 4000, "started": 3999, "lost": 0}
    runs.append(unbegun)
    result = {
        "measurement": "streams",
        "at": "2025-01-01T00:00:00+00:00",
        "load_average": 0.1,
        "rounds": 1,
        "seconds": 5.0,
        "machine": machine.describe(),
        "runs": runs,
    }
    results.save(result, tmp_path)
    (loaded,) = results.load_all(tmp_path)
    assert loaded == result

    page = tmp_path / "performance.md"
    page.write_text(f"before\n{document.BEGIN}old\n{document.END}after\n")
    monkeypatch.setattr(document, "PAGE", page)
    monkeypatch.setattr(document, "PLOT", tmp_path / "performance.svg")
    monkeypatch.setattr(results, "load_all", lambda: [loaded])
    document.main()
    document.main()  # It finds its marks again.

    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "only 3,999 began" in text
    assert text.count(tables.stream_figures(runs)) == 1
    assert all(KINDS[name].title in text for name in plot.COLORS)
    drawing = ET.parse(tmp_path / "performance.svg")
    assert len(drawing.findall(".//{*}polyline")) == 2 * len(plot.COLORS)
