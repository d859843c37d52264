"""A place where a script waits, for tests that let it go on when they have seen enough."""

import pytest

from flask_llmstream.testing import Gate


@pytest.fixture
def gate():
    """A gate; it is open in the end, that no thread waits there for a test that failed."""
    gate = Gate()
    yield gate
    gate.open()
