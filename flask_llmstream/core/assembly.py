"""From what a backend emits to clean items and the whole answer. Pure."""

from __future__ import annotations

import codecs
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..exceptions import EngineError, InvalidRequestError
from .messages import (
    Choice,
    Finish,
    InferenceResponse,
    Reasoning,
    Refusal,
    Token,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from .stopping import StopFilter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .messages import InferenceRequest, Item

__all__ = ["Assembler"]

_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class _ChoiceAssembly:
    """What one choice has come to so far."""

    __slots__ = (
        "decoder",
        "finish",
        "index",
        "is_cut",
        "logprobs",
        "reasoning",
        "refusal",
        "stop_filter",
        "text",
        "tokens",
        "tool_calls",
    )

    def __init__(self, index: int, stop_filter: StopFilter | None) -> None:
        self.index = index
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.refusal: list[str] = []
        self.tool_calls: dict[int, list[str]] = {}  # index: id, name, pieces of arguments
        self.logprobs: list[Token] = []
        self.tokens = 0
        self.finish: Finish | None = None
        self.is_cut = False
        self.decoder: codecs.IncrementalDecoder | None = None
        self.stop_filter = stop_filter

    @property
    def is_untouched(self) -> bool:
        return not (self.tokens or self.tool_calls or self.finish)

    @property
    def is_finished(self) -> bool:
        return self.finish is not None

    @property
    def has_text(self) -> bool:
        return bool(self.text) or (self.stop_filter is not None and self.stop_filter.is_holding)

    def whole(self) -> Choice:
        finish = self.finish or Finish("stop")
        return Choice(
            index=self.index,
            text="".join(self.text),
            reasoning="".join(self.reasoning),
            refusal="".join(self.refusal),
            tool_calls=tuple(
                ToolCall(call[0], call[1], "".join(call[2:]))
                for _, call in sorted(self.tool_calls.items())
            ),
            finish_reason=finish.reason,
            stop_sequence=finish.stop_sequence,
            logprobs=tuple(self.logprobs),
        )


class Assembler:
    """
    Makes one run's items clean, and adds them up.

    Bytes become text as characters complete, stop strings and `max_tokens` end a choice
    whether or not the backend knows of them, and what the request asked for and the
    output does not show (log probabilities, choices, a required tool call) is an error
    instead of silence. One text item counts as one token where the backend reports no
    `Usage`.

    Args:
        request: The run's request; `n`, `stop`, `max_tokens`, `logprobs` and
            `tool_choice` are read.

    Attributes:
        is_cut: Every choice has ended, and one of them here, not by the backend: it does
            not know, and need not go on.

    Thread safety: `text` from any thread; the rest is the producing worker's.
    """

    __slots__ = ("_choices", "_first", "_is_plain", "_request", "is_cut", "usage")

    def __init__(self, request: InferenceRequest) -> None:
        self._request = request
        self._choices = [
            _ChoiceAssembly(index, StopFilter(request.stop) if request.stop else None)
            for index in range(request.n)
        ]
        self._first = self._choices[0]
        # Most streams: text passes through, counted and kept.
        self._is_plain = not (request.stop or request.logprobs or request.max_tokens)
        self.usage: Usage | None = None
        self.is_cut = False

    @property
    def text(self) -> str:
        """Answer text of choice 0 so far."""
        return "".join(self._first.text)

    @property
    def tokens(self) -> int:
        """Completion tokens so far, over all choices, as they are counted here."""
        return sum(choice.tokens for choice in self._choices)

    @property
    def finished_choices(self) -> int:
        return sum(choice.is_finished for choice in self._choices)

    def accept(self, item: Item) -> tuple[Item, ...]:
        """
        Take what the backend emitted.

        Returns:
            The items to pass on, in order: none, one, or (a stop string was met after
            text) two.

        Raises:
            EngineError: The backend emitted what no backend may.
            InvalidRequestError: The output shows that the backend cannot do as asked.
        """
        if type(item) is str and self._is_plain:
            first = self._first
            if not item or first.finish is not None:
                return ()
            if not item.isascii():
                _check_text(item)
            first.text.append(item)
            first.tokens += 1
            return (item,)
        return tuple(self._accept(item))

    def _accept(self, item: Item) -> Iterator[Item]:
        if isinstance(item, Usage):
            self.usage = item
            yield item
            return
        choice = self._choice_of(item)
        if choice.is_finished:
            return
        if isinstance(item, bytes):
            if choice.decoder is None:
                choice.decoder = _new_utf8_decoder("strict")
                self._is_plain = False
            yield from self._accept_text(choice, _decode(choice.decoder, item))
        elif isinstance(item, str):
            if choice.decoder is not None and item:
                _decode(choice.decoder, b"", final=True)
            if not item.isascii():
                _check_text(item)
            yield from self._accept_text(choice, item)
        elif isinstance(item, Finish):
            yield from self._flush(choice)
            if not choice.is_finished:  # Else the tail of the text held a stop string.
                yield self._end(choice, item)
        elif self._has_room(choice):
            if isinstance(item, (Reasoning, Refusal)):
                _check_text(item.text)
                said = choice.reasoning if isinstance(item, Reasoning) else choice.refusal
                said.append(item.text)
            else:
                item = _add_tool_call(choice, item)
            yield item
        else:
            yield from self._cut_at_limit(choice)

    def _choice_of(self, item: Any) -> _ChoiceAssembly:
        if isinstance(item, (str, bytes)):
            index = getattr(item, "choice", 0)
        elif isinstance(item, (Reasoning, Refusal, ToolCallDelta, Finish)):
            index = item.choice
        else:
            raise EngineError(
                f"The model backend emitted {type(item).__name__}; it may emit str, bytes, "
                "Token, Reasoning, Refusal, ToolCallDelta, Usage and Finish."
            )
        if not 0 <= index < len(self._choices):
            raise EngineError(
                f"The model backend emitted choice {index}; {len(self._choices)} were asked for."
            )
        return self._choices[index]

    def _accept_text(self, choice: _ChoiceAssembly, text: str) -> Iterator[Item]:
        has_logprob = isinstance(text, Token) and text.logprob is not None
        if not text and not has_logprob:
            return
        if self._request.logprobs and not has_logprob and not choice.text and not choice.logprobs:
            raise InvalidRequestError("The model does not return logprobs.", param="logprobs")
        if not self._has_room(choice):
            yield from self._cut_at_limit(choice)
            return
        stop_filter = choice.stop_filter
        if stop_filter is None:
            yield self._keep(choice, text)
            return
        shown = stop_filter.feed(text)
        if shown or (has_logprob and stop_filter.matched is None):
            yield self._keep(choice, _retext(text, shown))
        if stop_filter.matched is not None:
            yield self._cut_at_stop(choice, stop_filter.matched)

    def _has_room(self, choice: _ChoiceAssembly) -> bool:
        """Count one more token. False once it is the first one over `max_tokens`."""
        # Not already at the limit: the backend may end by itself there, with its usage.
        limit = self._request.max_tokens
        if limit is not None and choice.tokens >= limit:
            return False
        choice.tokens += 1
        return True

    def _keep(self, choice: _ChoiceAssembly, text: str) -> str:
        choice.text.append(text)
        if isinstance(text, Token):
            if text.logprob is not None:
                choice.logprobs.append(text)
        elif choice.index:
            text = Token(text, choice=choice.index)
        return text

    def _cut_at_limit(self, choice: _ChoiceAssembly) -> Iterator[Item]:
        yield from self._flush(choice)
        if not choice.is_finished:
            choice.is_cut = True
            yield self._end(choice, Finish("length", choice=choice.index))

    def _cut_at_stop(self, choice: _ChoiceAssembly, stop: str) -> Finish:
        choice.is_cut = True
        return self._end(choice, Finish("stop", stop_sequence=stop, choice=choice.index))

    def _end(self, choice: _ChoiceAssembly, finish: Finish) -> Finish:
        choice.finish = finish
        choices = self._choices
        self.is_cut = all(each.is_finished for each in choices) and any(
            each.is_cut for each in choices
        )
        return finish

    def _flush(self, choice: _ChoiceAssembly) -> Iterator[Item]:
        """What is held back at a choice's end: half a character, the start of a stop string."""
        if choice.decoder is not None:
            # Cut in the middle of a character, by max_tokens say: shown, not lost.
            choice.decoder.errors = "replace"
            tail = choice.decoder.decode(b"", final=True)
        else:
            tail = ""
        stop_filter = choice.stop_filter
        if stop_filter is not None:
            tail = stop_filter.feed(tail) + stop_filter.flush()
        if tail:
            yield self._keep(choice, tail)
        if stop_filter is not None and stop_filter.matched is not None:
            yield self._cut_at_stop(choice, stop_filter.matched)

    def finish(self) -> tuple[Item, ...]:
        """
        The backend is done: returns the text that was held back.

        Raises:
            InvalidRequestError: The backend did not do what the request asked for.
        """
        items: list[Item] = []
        if any(choice.is_untouched for choice in self._choices[1:]):
            raise InvalidRequestError("The model returns one choice only.", param="n")
        for choice in self._choices:
            if not choice.is_finished:
                items.extend(self._flush(choice))
            if not choice.is_finished:
                self._end(choice, Finish("stop", choice=choice.index))
        first = self._first
        if (
            self._request.tools
            and self._request.tool_choice not in (None, "auto", "none")
            and first.finish is not None
            and first.finish.reason in ("stop", "tool_calls")
            and not first.tool_calls
        ):
            raise InvalidRequestError(
                "The model did not call a tool, as tool_choice asks.", param="tool_choice"
            )
        return tuple(items)

    def absorb(self, response: InferenceResponse) -> Iterator[Item]:
        """
        The items of a whole answer that a backend returned, to be accepted in turn; of each
        choice what was not emitted before.
        """
        emitted = {choice.index: choice for choice in self._choices}
        for choice in response.choices:
            so_far = emitted.get(choice.index) or _ChoiceAssembly(choice.index, None)
            if choice.reasoning and not so_far.reasoning:
                yield Reasoning(choice.reasoning, choice=choice.index)
            if choice.refusal and not so_far.refusal:
                yield Refusal(choice.refusal, choice=choice.index)
            if so_far.has_text:
                pass  # The returned text is the same text.
            elif choice.logprobs:
                yield from choice.logprobs
            elif choice.text:
                yield Token(choice.text, choice=choice.index) if choice.index else choice.text
            if not so_far.tool_calls:
                for index, call in enumerate(choice.tool_calls):
                    yield ToolCallDelta(
                        index,
                        id=call.id,
                        name=call.name,
                        arguments=call.arguments,
                        choice=choice.index,
                    )
            yield Finish(
                choice.finish_reason, stop_sequence=choice.stop_sequence, choice=choice.index
            )
        if response.usage is not None and self.usage is None:
            yield response.usage

    def response(self) -> InferenceResponse:
        """The whole answer. After `finish`."""
        choices = tuple(choice.whole() for choice in self._choices)
        first = choices[0]
        usage = self.usage
        if usage is None:
            # Counted, since the backend reports none. What the prompt cost nobody here knows.
            usage = Usage(0, self.tokens)
        return InferenceResponse(
            request_id=self._request.request_id,
            model=self._request.model,
            text=first.text,
            tool_calls=first.tool_calls,
            finish_reason=first.finish_reason,
            usage=usage,
            logprobs=first.logprobs,
            choices=choices,
        )


def _check_text(text: str) -> None:
    """Lone surrogates cannot be sent as UTF-8 (RFC 8259 8.1)."""
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise EngineError("The model backend emitted text that is not valid Unicode.") from exc


def _decode(decoder: codecs.IncrementalDecoder, data: bytes, *, final: bool = False) -> str:
    try:
        return decoder.decode(data, final)
    except UnicodeDecodeError as exc:
        raise EngineError("The model backend emitted bytes that are not valid UTF-8.") from exc


def _retext(token: str, shown: str) -> str:
    """*token* with the text that may be shown now; its log probability stays with it."""
    if not isinstance(token, Token) or shown == token:
        return shown if not isinstance(token, Token) else token
    return Token(shown, logprob=token.logprob, top_logprobs=token.top_logprobs, choice=token.choice)


def _add_tool_call(choice: _ChoiceAssembly, delta: ToolCallDelta) -> ToolCallDelta:
    _check_text(f"{delta.id}{delta.name}{delta.arguments}")
    call = choice.tool_calls.get(delta.index)
    if call is None:
        if not delta.id:
            # Every dialect needs one, and the same one in deltas and in the whole answer.
            delta = replace(delta, id=f"call_{secrets.token_hex(12)}")
        choice.tool_calls[delta.index] = [delta.id or "", delta.name or "", delta.arguments]
    else:
        call[1] = call[1] or delta.name or ""
        call.append(delta.arguments)
    return delta
