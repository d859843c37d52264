"""A server with a scripted model for each thing that may happen, for the vendors' clients."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from flask_llmstream import LLMStream, PermissionDeniedError, QueueFullError, request_finished
from flask_llmstream.testing import ScriptedBackend


class ScriptedService:
    """Models by name, and what they were asked."""

    def __init__(self):
        self.llm = LLMStream()
        self.backends = {}

    def add(self, model, *script, **options):
        self.backends[model] = ScriptedBackend(*script, **options)
        self.llm.add_backend(model, self.backends[model])
        return self.backends[model]

    def last(self, model):
        return self.backends[model].requests[-1]


class GuardedService(ScriptedService):
    """
    Such a server that counts the attempts of each model, and refuses those of some.

    No caller may have ``forbidden``; ``busy`` is full, and ``recovers`` is at first.
    """

    def __init__(self):
        super().__init__()
        self.attempts = Counter()
        self.llm.before_submit(self._count)
        self.llm.permission_check(self._check)

    def _count(self, request):
        self.attempts[request.model] += 1
        return request

    def _check(self, identity, request):
        if request.model == "forbidden":
            raise PermissionDeniedError("Not for you.")
        if request.model == "busy" or (
            request.model == "recovers" and self.attempts["recovers"] == 1
        ):
            raise QueueFullError("The queue is full.", retry_after=0.1)


@pytest.fixture
def finished():
    """The outcomes of this test's requests, by model."""
    outcomes = defaultdict(list)

    def receive(sender, outcome):
        outcomes[outcome.request.model].append(outcome)

    with request_finished.connected_to(receive):
        yield outcomes
