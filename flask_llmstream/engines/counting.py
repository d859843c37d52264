"""Counting the tokens of a prompt, in an engine of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.messages import InferenceResponse, Usage

if TYPE_CHECKING:
    from ..core.messages import InferenceRequest
    from ..typing import Engine, WorkerKind

__all__ = ["CountingBackend"]


class CountingBackend:
    """
    Counts what another backend would have to read. The count is the usage.

    As a backend it gets from an engine what answers get: a queue, workers of the right
    kind, deadlines, cancel.

    Args:
        engine: The model's; what generates for it has `count_tokens`.
        model: Which of its models.
    """

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine = engine
        self._model = model
        self.worker: WorkerKind = getattr(engine.backend_for(model), "worker", "thread")

    def generate(self, request: InferenceRequest) -> InferenceResponse:
        """An answer without any text."""
        tokens = self._engine.backend_for(self._model).count_tokens(request)
        # A length of nothing: no engine misses the tool call that the request may ask for.
        return InferenceResponse(finish_reason="length", usage=Usage(tokens, 0))
