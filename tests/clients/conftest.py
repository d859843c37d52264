"""One server for all clients, and the check that is the same for all of them."""

from __future__ import annotations

import pytest
from flask_apps import WAIT_SECONDS, serving

from .dialects import heard
from .service import Service, job_for


@pytest.fixture(scope="session")
def service():
    return Service()


@pytest.fixture(scope="session")
def url(service):
    with serving(service.app) as url:
        yield url


@pytest.fixture
def check(service, url):
    """Checks that a reader reads a scenario: (reader, scenario, ask: `Job` → `Answer`)."""

    def check(reader, scenario, ask):
        with service.play(scenario) as performance:
            answer = ask(job_for(scenario, reader.dialect, url))
            assert reader.tells(answer).brief() == reader.expects(scenario).brief()
            if scenario.is_submitted:
                # Before the gate opens: a backend that waits there was told all the same.
                assert isinstance(performance.error(), scenario.ends)
                assert performance.request.cancelled
                if "chat" in reader.dialect.has:
                    assert heard(performance.request.messages) == heard(scenario.messages)
                else:
                    assert scenario.messages[-1].text in performance.request.last_user_text
        if scenario.is_submitted:
            performance.backend.closed.wait(WAIT_SECONDS)

    return check
