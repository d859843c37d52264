"""Answering several waiting requests with one call of a backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..core.messages import InferenceRequest
    from ..core.runtime import Parker
    from .run import Run

__all__ = ["Batch", "BatchLimits", "run_batch", "weigh"]

_CHARACTERS_PER_TOKEN = 4
_UNLIMITED_ANSWER_TOKENS = 256
"""What an answer without `max_tokens` is taken to weigh."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """
    How much goes into one batch.

    Args:
        max_size: Requests.
        max_tokens: Prompt and answer tokens together, estimated; one larger request
            still goes alone.
        wait_seconds: How long an incomplete batch waits for more.
    """

    max_size: int = 8
    max_tokens: int = 8192
    wait_seconds: float = 0.005


def weigh(request: InferenceRequest) -> int:
    """Tokens that *request* may come to: about four characters each, plus `max_tokens`."""
    characters = len(request.prompt) + sum(len(message.text) for message in request.messages)
    answer = request.max_tokens or _UNLIMITED_ANSWER_TOKENS
    return characters // _CHARACTERS_PER_TOKEN + answer


class Batch:
    """
    Runs to be answered by one call, as they are gathered.

    Attributes:
        runs: In the order of their answers.
        parker: Of the worker that waits for it to become full.

    Thread safety: none of its own; the engine's lock guards it.
    """

    __slots__ = ("_limits", "_tokens", "parker", "runs")

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._tokens = 0
        self.runs: list[Run] = []
        self.parker: Parker | None = None

    @property
    def is_full(self) -> bool:
        return len(self.runs) >= self._limits.max_size

    def add(self, run: Run) -> bool:
        """Take *run* in; False where it is a stream, or would be over the limits."""
        tokens = self._tokens + weigh(run.request)
        if run.is_stream or self.is_full or (self.runs and tokens > self._limits.max_tokens):
            return False
        self.runs.append(run)
        self._tokens = tokens
        return True


def run_batch(function: Callable[[list[InferenceRequest]], Any], runs: Iterable[Run]) -> None:
    """
    Answer *runs*, all of them not streams, with one call of *function*, a backend's
    ``generate_batch``. Those that are over already are left out. Raises nothing.
    """
    runs = [run for run in runs if not run.is_over]
    if not runs:
        return
    runtime.make_logging_native()
    try:
        with runs[0].context():
            responses = function([run.request for run in runs])
        if len(responses) != len(runs):
            raise ValueError(
                f"generate_batch() was given {len(runs)} requests "
                f"and returned {len(responses)} responses."
            )
    except BaseException as exc:
        for run in runs:
            run.fail(exc)
        return
    for run, response in zip(runs, responses, strict=True):
        run.absorb(response)
