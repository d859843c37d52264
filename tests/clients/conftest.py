"""One server for all clients."""

from __future__ import annotations

import pytest
from flask_apps import serving

from .service import Service


@pytest.fixture(scope="session")
def service():
    return Service()


@pytest.fixture(scope="session")
def url(service):
    with serving(service.app) as url:
        yield url
