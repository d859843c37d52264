"""The embedded model through gunicorn gevent, against the same model in this process."""

from __future__ import annotations

import http.client
import json
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from flask_llmstream import AsyncInferenceEngine, InferenceRequest, LlamaCppBackend, Message

TOKENS = 120
ROUNDS = 5
PROMPT = "Tell me a long story about a lighthouse."
HERE = Path(__file__).parent


def create_app():
    """What the server runs: the model, a backend that only waits, and what it saw."""
    from flask import Flask, jsonify

    from flask_llmstream import LLMStream
    from flask_llmstream.core import runtime

    app = Flask(__name__)
    llm = LLMStream(app)
    llm.add_backend("small", LlamaCppBackend())
    cancelled = []

    @llm.backend("silent")
    def silent(request):
        request.on_cancel(lambda: cancelled.append(time.time()))
        yield "one token"
        runtime.sleep(3)

    app.register_blueprint(llm.openai_blueprint())
    app.add_url_rule("/cancelled", view_func=lambda: jsonify(cancelled))
    return app


def body(model, *, stream=True, max_tokens=TOKENS, seed=1):
    return json.dumps(
        {
            "model": model,
            "stream": stream,
            "max_tokens": max_tokens,
            "seed": seed,
            "messages": [{"role": "user", "content": PROMPT}],
        }
    )


def ask(port, model, headers=(), **options):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    begun = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", body(model, **options), {**dict(headers)})
    return connection, connection.getresponse(), begun


def through_http(port):
    connection, response, begun = ask(port, "small")
    first = None
    tokens = 0
    while line := response.readline():
        if b'"content":"' in line and b'"role"' not in line:
            first = first or time.perf_counter()
            tokens += 1
    connection.close()
    return first - begun, tokens / (time.perf_counter() - begun)


def in_process(engine):
    seen = []
    request = InferenceRequest(
        messages=[Message("user", PROMPT)],
        max_tokens=TOKENS,
        seed=1,
        stream_callback=lambda item: seen.append((time.perf_counter(), item)) or True,
    )
    begun = time.perf_counter()
    engine.submit(request).get(120)
    tokens = [when for when, item in seen if isinstance(item, str)]
    return tokens[0] - begun, len(tokens) / (time.perf_counter() - begun)


def disconnect(port):
    connection, response, _ = ask(port, "silent")
    while b"one token" not in response.readline():
        pass
    left = time.time()
    response.close()
    connection.close()
    while True:
        with_state = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with_state.request("GET", "/cancelled")
        seen = json.loads(with_state.getresponse().read())
        with_state.close()
        if seen and seen[-1] >= left:
            return seen[-1] - left
        time.sleep(0.05)


def deadline(port, seconds=0.5):
    connection, response, begun = ask(port, "silent", {"X-Request-Timeout": str(seconds)}.items())
    response.read()
    connection.close()
    return time.perf_counter() - begun - seconds


def report(name, values, unit, scale=1.0):
    print(
        f"{name}: median {statistics.median(values) * scale:.2f} {unit}, "
        f"worst {max(values) * scale:.2f} {unit}"
    )


def main():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "gunicorn", "-k", "gevent", "-b", f"127.0.0.1:{port}"),
            *("--chdir", str(HERE), "--log-level", "error", "model:create_app()"),
        ]
    )
    try:
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.1)
        engine = AsyncInferenceEngine(LlamaCppBackend(), worker_threads=1)
        through_http(port)
        in_process(engine)
        ratios, firsts, firsts_inside = [], [], []
        for _ in range(ROUNDS):
            first, rate = through_http(port)
            first_inside, rate_inside = in_process(engine)
            ratios.append(rate / rate_inside)
            firsts.append(first)
            firsts_inside.append(first_inside)
        engine.shutdown(timeout_seconds=5)
        print(
            f"tokens/s through HTTP against in-process: {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})"
        )
        report("time to first token, HTTP", firsts, "ms", 1000)
        report("time to first token, in-process", firsts_inside, "ms", 1000)
        report("disconnect to cancel", [disconnect(port) for _ in range(10)], "ms", 1000)
        report("answer after the deadline", [deadline(port) for _ in range(6)], "ms", 1000)
    finally:
        server.terminate()
        server.wait(40)


if __name__ == "__main__":
    main()
