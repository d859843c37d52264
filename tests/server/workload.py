"""Backends as users write them: they log, sleep, use the app, a database, an HTTP client."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from pathlib import Path

from flask import current_app, request

from flask_llmstream import Finish, Usage
from flask_llmstream.core import runtime

logger = logging.getLogger("workload")

TOKENS = 20


class Batching:
    """Serves every sequence from one native thread, a token each step."""

    max_concurrency = 100

    def __init__(self):
        self._sequences = deque()
        self._is_started = False

    def submit(self, asked, emit):
        self._sequences.append((emit, iter(range(TOKENS))))
        if not self._is_started:
            self._is_started = True
            runtime.start_thread(self._run)
        return lambda: None

    def _run(self):
        while True:
            for _ in range(len(self._sequences)):
                emit, numbers = sequence = self._sequences.popleft()
                number = next(numbers, None)
                if number is None:
                    emit(Usage(1, TOKENS))
                    emit(Finish("stop"))
                elif emit(f"{number} "):
                    self._sequences.append(sequence)
            runtime.sleep(0.001)


def add_to(app, llm):
    _add_database_backends(app, llm)
    _add_upstream_backend(llm)
    llm.add_backend("batching", Batching())

    @llm.backend("logging", worker_threads=4)
    def log_and_sleep(asked):
        """On a native thread, which in a patched process the greenlets log beside."""
        for number in range(TOKENS):
            logger.info("%s is at %s", asked.request_id, number)
            current_app.logger.warning("%s is at %s", asked.request_id, number)
            time.sleep(0.001)
            yield f"{number} "

    @app.before_request
    def log_request():
        logger.info("asked for %s", request.path)


def _add_database_backends(app, llm):
    from sqlalchemy import NullPool, create_engine, text
    from sqlalchemy.orm import Session, scoped_session, sessionmaker

    folder = Path(os.environ["SERVER_TEST_CONTROL"])

    def new_engine(name, **options):
        engine = create_engine(f"sqlite:///{folder / name}", **options)
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE IF NOT EXISTS words (number int, word text)"))
            connection.execute(text("DELETE FROM words"))
            for number in range(TOKENS):
                connection.execute(text("INSERT INTO words VALUES (:n, :n)"), {"n": number})
        return engine

    # As Flask's own documentation has it: a session a context, removed with it.
    scoped = scoped_session(sessionmaker(new_engine("scoped.sqlite", poolclass=NullPool)))
    app.teardown_appcontext(lambda _: scoped.remove())
    plain = new_engine("plain.sqlite")
    query = text("SELECT word FROM words WHERE number = :n")

    @llm.backend("scoped-session", worker_threads=4)
    def scoped_session_backend(asked):
        for number in range(TOKENS):
            logger.info("%s reads %s", asked.request_id, number)
            yield scoped.execute(query, {"n": number}).scalar_one() + " "

    @llm.backend("plain-session", worker_threads=4)
    def plain_session_backend(asked):
        logger.info("%s uses a %s", asked.request_id, type(plain.pool).__name__)
        with Session(plain) as session:
            for number in range(TOKENS):
                yield session.execute(query, {"n": number}).scalar_one() + " "

    @app.route("/words")
    def words():
        """What a view does meanwhile, in a greenlet: the same two databases."""
        with Session(plain) as session:
            count = session.execute(text("SELECT count(*) FROM words")).scalar_one()
        return f"{count + scoped.execute(text('SELECT count(*) FROM words')).scalar_one()}"


def _add_upstream_backend(llm):
    clients = []

    @llm.backend("upstream", worker="greenlet")
    def ask_upstream(asked):
        import httpx

        if not clients:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
            clients.append(httpx.Client(limits=limits, timeout=20.0))
        with clients[0].stream("GET", asked.prompt) as response:
            response.raise_for_status()
            yield from response.iter_text()
