"""Several submitted requests whose answers make up one."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

from ..core.messages import Usage
from ..exceptions import LLMStreamError, RequestCancelledError
from .handle import InferenceHandle

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..core.messages import InferenceResponse

__all__ = ["gather"]


def gather(handles: Sequence[InferenceHandle], choices: Sequence[int]) -> InferenceHandle:
    """
    One handle for all of *handles*.

    It resolves when the last of them has, with their answers joined; or with the first
    error, which ends the others. To cancel it cancels all.

    Args:
        handles: In the order of their choices, which are numbered through.
        choices: How many each of them answers with.
    """
    return _Gathering(handles, choices).handle


class _Gathering:
    __slots__ = ("_choices", "_claims", "_handles", "handle")

    def __init__(self, handles: Sequence[InferenceHandle], choices: Sequence[int]) -> None:
        first = handles[0]
        self._handles = handles
        self._choices = choices
        self._claims = [True]  # pop() is atomic: who gets it says how all of it ended.
        self.handle = InferenceHandle(
            first.request_id, cancel=self._cancel, text=lambda: first.text
        )
        for handle in handles:
            handle.add_done_callback(self._on_done)

    def _on_done(self) -> None:
        responses: list[InferenceResponse] = []
        for handle in self._handles:
            outcome = handle.outcome
            if isinstance(outcome, LLMStreamError):
                reason = RequestCancelledError(
                    "Another part of the request failed.", cause="other_part"
                )
                self._end(outcome, reason)
                return
            if outcome is not None:
                responses.append(outcome)
        # Of two that resolve at once, both may see that they were the last.
        if len(responses) == len(self._handles):
            self._end(_joined(responses, self._choices))

    def _cancel(self, reason: LLMStreamError | None) -> None:
        reason = reason or RequestCancelledError("The request was cancelled.")
        self._end(reason, reason)

    def _end(
        self, outcome: InferenceResponse | LLMStreamError, reason: LLMStreamError | None = None
    ) -> None:
        try:
            self._claims.pop()
        except IndexError:
            return
        if reason is not None:
            for handle in self._handles:
                handle.cancel(reason)
        self.handle.publish(outcome)


def _joined(responses: Sequence[InferenceResponse], choices: Sequence[int]) -> InferenceResponse:
    """
    One answer of them all. The single-choice fields are the first one's; times of several
    runs do not add up to anything, so there are none.
    """
    starts = accumulate(choices[:-1], initial=0)
    usages = [response.usage for response in responses if response.usage is not None]
    return replace(
        responses[0],
        usage=_sum(usages) if usages else None,
        cache_hit=all(response.cache_hit for response in responses),
        timings={},
        choices=tuple(
            replace(choice, index=choice.index + start)
            for response, start in zip(responses, starts, strict=True)
            for choice in response.choices
        ),
    )


def _sum(usages: Sequence[Usage]) -> Usage:
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        cached_tokens=sum(usage.cached_tokens for usage in usages),
        reasoning_tokens=sum(usage.reasoning_tokens for usage in usages),
    )
