"""A conversation in the terminal."""

from __future__ import annotations

import importlib.util
import io
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from .call import request_finished
from .core.messages import InferenceRequest, Message
from .exceptions import LLMStreamError

if TYPE_CHECKING:
    from .extension import LLMStream
    from .outcome import Outcome

__all__ = ["Chat"]

_PROMPT = "> "


class Chat:
    """
    Asks a model what is typed, and shows its answers as they are produced.

    Args:
        llm: Of the current app.
        model: Model id.
        system: A system message to begin with; empty for none.
        sampling: Fields of every `InferenceRequest`: ``max_tokens``, ``temperature``, …

    Attributes:
        is_interactive: Whether someone sits at a terminal. Else there is no prompt, only
            answers, so that it can stand in a pipe.
        messages: What was said so far. A question that failed is not in it, and an
            answer that was stopped is in it as far as it went.

    Thread safety: the main thread's, which gets Ctrl-C.
    """

    def __init__(self, llm: LLMStream, *, model: str, system: str = "", **sampling: Any) -> None:
        self._llm = llm
        self._model = model
        self._sampling = sampling
        self.messages = [Message("system", system)] if system else []
        self.is_interactive = sys.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> int:
        """
        Ask and answer until the input ends. In an app context.

        Returns:
            How many questions failed.

        Raises:
            KeyboardInterrupt: Ctrl-C, where it is not interactive.
        """
        if self.is_interactive:
            click.echo(f"{self._model}. Ctrl-C stops an answer, Ctrl-D leaves.")
            if importlib.util.find_spec("readline"):  # not on Windows
                import readline  # noqa: F401 - makes input() a line editor
        elif isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        failures = 0
        while (text := self._read()) is not None:
            if text.strip() and not self._ask(text):
                failures += 1
        return failures

    def _read(self) -> str | None:
        """The next line; None at the end."""
        try:
            return input(_PROMPT if self.is_interactive else "")
        except EOFError:
            pass
        except KeyboardInterrupt:
            if not self.is_interactive:
                raise
        if self.is_interactive:
            click.echo()
        return None

    def _ask(self, text: str) -> bool:
        """Show the answer to *text*. False where it failed."""
        messages = [*self.messages, Message("user", text)]
        request = InferenceRequest(model=self._model, messages=messages, **self._sampling)
        outcomes: list[Outcome] = []

        def remember(_app: Any, *, outcome: Outcome) -> None:
            outcomes.append(outcome)

        answer = ""
        try:
            with (
                request_finished.connected_to(remember),
                closing(self._llm.tokens(request)) as tokens,
            ):
                for token in tokens:
                    answer += token
                    click.echo(token, nl=False)
        except LLMStreamError as exc:
            click.echo(f"\nError: {exc}" if answer else f"Error: {exc}", err=True)
            return False
        except KeyboardInterrupt:
            if not self.is_interactive:
                raise
            click.echo(" [stopped]")
        else:
            click.echo()
            if self.is_interactive:
                for outcome in outcomes:
                    click.secho(_summary(outcome), dim=True)
        if answer:
            self.messages = [*messages, Message("assistant", answer)]
        return True


def _summary(outcome: Outcome) -> str:
    """How long the answer is, how fast it came, and whether it was cut off."""
    response = outcome.response
    if response is None or response.usage is None:
        return ""
    tokens, timings = response.usage.completion_tokens, response.timings
    first = timings.get("first_token", timings["total"])
    summary = f"{tokens} tokens, the first after {first:.2f} s"
    if tokens > 1 and timings["total"] > first:
        summary += f", then {(tokens - 1) / (timings['total'] - first):.0f} tokens/s"
    if outcome.finish_reason == "length":
        summary += "; cut off at the length limit"
    return summary
