"""The server that all clients ask: every blueprint, and a model for each scenario."""

from __future__ import annotations

from concurrency import wait_until
from flask_apps import make_app

from flask_llmstream import FEATURES, AsyncInferenceEngine, LLMStream, request_finished
from flask_llmstream.testing import Gate, ScriptedBackend, Signal

from .answers import Job
from .scenarios import REST, SCENARIOS, WAIT

KEY = "secret"
PING_SECONDS = 0.04

# Where each blueprint is registered, beside its own prefix, and with which settings.
MOUNTS = {
    "": {},
    "/pinging": {"heartbeat_seconds": PING_SECONDS},
    "/locked": {"api_keys": {"alice": "another"}},
    "/single": {"models": ["text"]},
}
BLUEPRINTS = {
    "openai_blueprint": "/v1",
    "anthropic_blueprint": "/v1",
    "ollama_blueprint": "/api",
    "ai_sdk_blueprint": "/api/ai",
    "native_blueprint": "/stream",
}


class Rest(Gate):
    """Silence that is long enough for a heartbeat or two."""

    def pass_through(self, timeout_seconds=PING_SECONDS * 3):
        never = Signal()
        try:
            never.wait(timeout_seconds)
        except TimeoutError:
            return


class Performance:
    """One scenario while it is played; a context manager that leaves no backend waiting."""

    def __init__(self, scenario):
        self.scenario = scenario
        self.gate = Gate()
        steps = {WAIT: self.gate, REST: Rest()}
        self.backend = ScriptedBackend(
            *(steps[step] if step in (WAIT, REST) else step for step in scenario.script)
        )
        self.outcomes = []

    def __enter__(self):
        request_finished.connect(self._on_finished)
        return self

    def __exit__(self, *exc_info):
        request_finished.disconnect(self._on_finished)
        self.gate.open()

    def _on_finished(self, sender, outcome):
        self.outcomes.append(outcome)

    @property
    def request(self):
        (request,) = self.backend.requests
        return request

    def error(self):
        """What the server says that the request ended with; None for an answer."""
        wait_until(lambda: self.outcomes)
        (outcome,) = self.outcomes
        return outcome.error


class Service:
    """
    The app. `play` prepares what the next request of a scenario gets.

    All models share one engine, so that a few hundred tests make a handful of threads.
    """

    supports = FEATURES

    def __init__(self):
        self._stage = {}
        llm = LLMStream()
        llm.add_engine(
            AsyncInferenceEngine(self),
            models=[scenario.name for scenario in SCENARIOS],
        )
        self.app = make_app(llm)
        for mount, settings in MOUNTS.items():
            for method, prefix in BLUEPRINTS.items():
                blueprint = getattr(llm, method)(name=f"{method}{mount}", **settings)
                self.app.register_blueprint(blueprint, url_prefix=f"{mount}{prefix}")

    def generate(self, request):
        return self._stage[request.model].backend.generate(request)

    def play(self, scenario):
        """The performance that the next request for *scenario* is answered with."""
        performance = self._stage[scenario.name] = Performance(scenario)
        return performance


def job_for(scenario, dialect, url):
    """What the readers of *dialect* have to do."""
    headers = {}
    if scenario.timeout_seconds is not None:
        headers["X-Request-Timeout"] = str(scenario.timeout_seconds)
    return Job(
        base_url=f"{url}{scenario.mount}{dialect.base_path}",
        body=dialect.body(scenario),
        api_key=KEY,
        headers=headers,
        leaves=scenario.leaves,
        timeout_seconds=scenario.gives_up_seconds,
    )
