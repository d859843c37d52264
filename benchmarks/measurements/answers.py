"""Short answers against a plain Flask view that answers the same bytes, on one worker class."""

from __future__ import annotations

import http.client
import tempfile

from ..figures import Row, at_most, by_round, ratios, spread
from ..lab import PATH, chat_body

WORKERS = {"worker": "worker class", "gevent": "gevent worker"}
# So many that the server is never idle; few enough to be none of the cost.
AT_ONCE = 16


def measure(lab):
    runs = []
    for number in range(lab.rounds):
        for worker, title in WORKERS.items():
            with lab.serving(f"ours-{worker}") as ours:
                for stream in (True, False):
                    body = chat_body("instant", stream=stream)
                    with plain_server(lab, worker, ours, body) as plain:
                        for connections in (1, AT_ONCE):
                            for who, server in (("ours", ours), ("plain", plain)):
                                run = lab.request(server, body, connections=connections)
                                of = {"who": who, "worker": worker, "stream": stream}
                                runs.append({**of, "round": number, **run})
            lab.say(f"round {number + 1}: answers of the {title}")
    return runs


def plain_server(lab, worker, ours, body):
    """One that answers what *ours* does."""
    connection = http.client.HTTPConnection("127.0.0.1", ours.port, timeout=10)
    connection.request("POST", PATH, body)
    response = connection.getresponse()
    with tempfile.NamedTemporaryFile(dir=lab.programs, delete=False) as file:
        file.write(response.read())
    connection.close()
    return lab.serving(
        f"plain-{worker}",
        BENCHMARK_ANSWER=file.name,
        BENCHMARK_ANSWER_TYPE=response.headers["Content-Type"],
    )


def rows(runs):
    rows = []
    for worker, title in WORKERS.items():

        def figure(field, who, *, stream, connections=1, worker=worker):
            of = {"worker": worker, "stream": stream, "connections": connections}
            return by_round(runs, field, who=who, **of)

        for what, field, stream, target in (
            ("time to first token, added to a plain view's, p50", "first_p50_ms", True, 0.5),
            ("time to first token, added to a plain view's, p99", "first_p99_ms", True, 2),
            ("not streaming, added to a plain view's time, p50", "p50_ms", False, 0.5),
            ("not streaming, added to a plain view's time, p99", "p99_ms", False, 2),
        ):
            ours, plain = (figure(field, who, stream=stream) for who in ("ours", "plain"))
            added = [ours[each] - plain[each] for each in ours]
            rows.append(at_most(f"{what}, {title}", added, target, "ms"))

        costs, rates = (
            [figure(field, who, stream=True, connections=AT_ONCE) for who in ("ours", "plain")]
            for field in ("microseconds_per_request", "requests_per_second")
        )
        what = f"CPU a stream of one token, set up and torn down, {title}: against a plain view"
        rows.append(at_most(what, ratios(*costs), 1.6, "×"))
        ours, plain = (spread([*each.values()]) for each in rates)
        rows.append(Row(f"requests/s at that, {title}: and the plain view", f"{ours}; {plain}"))
    return rows
