"""A Flask view that answers the same bytes: what an answer costs without this package."""

from __future__ import annotations

import os
from pathlib import Path

from flask import Flask, Response


def create_app():
    app = Flask(__name__)
    body = Path(os.environ["BENCHMARK_ANSWER"]).read_bytes()
    content_type = os.environ["BENCHMARK_ANSWER_TYPE"]

    @app.post("/v1/chat/completions")
    def answer():
        return Response(body, content_type=content_type)

    return app
