"""
OpenAI's older completions: ``POST /v1/completions``, streamed and whole.

A list of prompts is as many requests, run at once; prompt *i*'s *j*-th choice has the index
``i * n + j``. A prompt reaches the backend as `InferenceRequest.prompt`; the package's own
backends put it to chat models as what the user says.

Other than OpenAI's:

- Without `max_tokens` a model writes until it is done, or `MAX_TOKENS_LIMIT` is reached. OpenAI
  cuts off after 16 tokens, which nobody who leaves the field out expects.
- Prompts are text. Token ids, `suffix`, and `echo` with `logprobs` (which would be those of the
  prompt) need what no backend here offers, and are refused.
- What is not answer text has no place in this shape. Reasoning and tool calls are left out;
  where a refusal is, the choice ends with ``content_filter``.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

from ..core.messages import Finish, Refusal, Token
from ..framing import FRAMINGS, TEXT
from ..framing.text import TextRenderer
from .answer_ids import COMPLETION, answer_id
from .decoding import decode, invalid
from .encoding import encode
from .extra_body import read_extra_body
from .generation import MAX_CHOICES, SamplingBody, read_sampling
from .openai_chunks import ChunkRenderer, CountingRenderer, StreamOptions
from .openai_objects import FINGERPRINT, error_object, finite_logprob, usage_object
from .parsed import Parsed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ..core.messages import Choice, InferenceRequest, InferenceResponse, Item
    from ..exceptions import LLMStreamError
    from ..framing import Framing
    from ..typing import EventRenderer

__all__ = ["OpenAICompletionsDialect", "ParsedCompletion"]


class _CompletionBody(SamplingBody, kw_only=True):
    prompt: str | list[Any]
    echo: bool | None = None
    suffix: str | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    stream_options: StreamOptions | None = None
    tools: list[Any] | None = None
    user: str | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None


# What has a name in the request, or is about the answer's form. The rest of the fields
# above is there for its type.
_OWN_FIELDS = frozenset(SamplingBody.__struct_fields__) | {
    "prompt",
    "echo",
    "suffix",
    "best_of",
    "logprobs",
    "stream_options",
    "tools",
}

_decoder = msgspec.json.Decoder(_CompletionBody)


@dataclass(frozen=True, slots=True)
class ParsedCompletion(Parsed):
    """
    A body, one request for each of its prompts, and what the answer has to say.

    Args:
        n: Choices told of each prompt; its request may ask for more, to choose from.
        logprobs: Alternatives told of each token; None tells no log probabilities.
        echoed: The prompts as the client wrote them; empty where they are not echoed.
        include_usage: The usage, in a chunk of its own at the stream's end.
        continuous_usage: The usage so far, in every chunk.
    """

    n: int = 1
    logprobs: int | None = None
    echoed: tuple[str, ...] = ()
    include_usage: bool = False
    continuous_usage: bool = False


class OpenAICompletionsDialect:
    """
    The `Dialect` of clients that complete text.

    Args:
        clock: Unix time in seconds; gives `created`.

    Thread safety: immutable; share one freely. A renderer belongs to one response.
    """

    name = "openai_completions"
    framings = FRAMINGS
    streams_by_default = False
    body_type = _CompletionBody

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock

    def parse(self, body: bytes) -> ParsedCompletion:
        """
        Read a body; at most `MAX_CHOICES` sequences, all prompts' together.

        Raises:
            InvalidRequestError: Names the field in `param` and in its message.
        """
        fields = decode(_decoder, body)
        prompts = _read_prompts(fields.prompt)
        _check(fields, len(prompts))
        extra_body = read_extra_body(body, _OWN_FIELDS)
        request, *others = (_read_request(fields, prompt, extra_body) for prompt in prompts)
        options = fields.stream_options or StreamOptions()
        return ParsedCompletion(
            request=request,
            stream=fields.stream,
            n=fields.n or 1,
            logprobs=fields.logprobs,
            echoed=tuple(prompts) if fields.echo else (),
            include_usage=options.shows_usage,
            continuous_usage=options.shows_usage_so_far,
            others=tuple(others),
        )

    def renderer(self, parsed: Parsed, framing: Framing) -> EventRenderer:
        """
        Chunks as SSE or NDJSON, or the bare text of choice 0.

        Raises:
            InvalidRequestError: `best_of`: which ones are best shows at their end.
        """
        completion = _as_completion(parsed)
        if any(request.n > completion.n for request in completion.requests):
            raise invalid("best_of", "cannot be streamed where it is more than `n`")
        if framing == TEXT:
            return _EchoingText(*completion.echoed[:1])
        renderer = _CompletionRenderer(completion, framing, int(self._clock()))
        return CountingRenderer(renderer) if completion.continuous_usage else renderer

    def document(self, parsed: Parsed, response: InferenceResponse) -> bytes:
        """A `text_completion`."""
        completion = _as_completion(parsed)
        request = completion.request
        return encode(
            {
                "id": answer_id(request, COMPLETION),
                "object": "text_completion",
                "created": int(self._clock()),
                "model": request.model or response.model,
                "system_fingerprint": FINGERPRINT,
                "choices": [
                    {
                        "index": index,
                        "text": prompt + choice.text,
                        "logprobs": None
                        if completion.logprobs is None
                        else _logprobs(choice.logprobs, completion.logprobs),
                        "finish_reason": _finish_reason(
                            choice.finish_reason, was_refused=bool(choice.refusal)
                        ),
                    }
                    for index, (prompt, choice) in enumerate(_told(completion, response.choices))
                ],
                "usage": usage_object(response.usage),
            }
        )

    def error_document(self, error: LLMStreamError) -> bytes:
        """OpenAI's error object, as the body of a 4xx or 5xx."""
        return encode(error_object(error))


def _read_prompts(prompt: str | list[Any]) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not all(isinstance(each, str) for each in prompts):
        raise invalid("prompt", "must be text, or a list of texts; token ids are not taken")
    if not prompts or not all(prompts):
        raise invalid("prompt", "must not be empty")
    return prompts


def _check(fields: _CompletionBody, prompts: int) -> None:
    n = fields.n or 1
    candidates = n if fields.best_of is None else fields.best_of
    if candidates < n:
        raise invalid("best_of", "must be at least `n`")
    if prompts * candidates > MAX_CHOICES:
        raise invalid(
            "prompt",
            f"at most {MAX_CHOICES} completions a request; prompts, times `n` or `best_of`",
        )
    if fields.suffix:
        raise invalid("suffix", "is not supported; leave it out")
    if fields.echo and fields.logprobs is not None:
        raise invalid("logprobs", "cannot be had with `echo`: prompts are not scored")
    if fields.tools:
        raise invalid("tools", "have no place in a completion; use chat completions")


def _read_request(
    fields: _CompletionBody, prompt: str, extra_body: dict[str, Any]
) -> InferenceRequest:
    request = read_sampling(fields, prompt=prompt)
    # Copies: what an app does to one of several requests is not done to the others.
    request.metadata = {**request.metadata}
    request.extra_body = {**extra_body}
    if fields.user is not None:
        request.metadata = {"user": fields.user, **request.metadata}
    candidates = fields.best_of or request.n
    request.logprobs = fields.logprobs is not None or candidates > request.n
    request.top_logprobs = fields.logprobs or 0
    request.n = candidates
    return request


def _as_completion(parsed: Parsed) -> ParsedCompletion:
    """*parsed* also where it came from no body."""
    if isinstance(parsed, ParsedCompletion):
        return parsed
    request = parsed.request
    return ParsedCompletion(request, parsed.stream, n=request.n, others=parsed.others)


def _told(completion: ParsedCompletion, choices: Sequence[Choice]) -> Iterator[tuple[str, Choice]]:
    """The choices that the answer has, in its order, each with what is echoed before it."""
    start = 0
    for number, request in enumerate(completion.requests):
        candidates = choices[start : start + request.n]
        start += request.n
        if request.n > completion.n:
            candidates = sorted(candidates, key=_mean_logprob, reverse=True)[: completion.n]
        prompt = completion.echoed[number] if completion.echoed else ""
        for choice in candidates:
            yield prompt, choice


def _mean_logprob(choice: Choice) -> float:
    scores = [
        finite_logprob(token.logprob) for token in choice.logprobs if token.logprob is not None
    ]
    return sum(scores) / len(scores) if scores else finite_logprob(-math.inf)


def _logprobs(tokens: Sequence[Token], alternatives: int, offset: int = 0) -> dict[str, Any] | None:
    """
    The `logprobs` of a chunk or a whole choice; None where no token carries any.

    Args:
        tokens: In order.
        alternatives: How many each shows beside itself, though the backend may offer more.
        offset: Where the first of them begins in the choice's text, in characters.
    """
    scored = [(token, token.logprob) for token in tokens if token.logprob is not None]
    if not scored:
        return None
    return {
        "tokens": [str(token) for token, _ in scored],
        "token_logprobs": [finite_logprob(logprob) for _, logprob in scored],
        "top_logprobs": [_alternatives(*each, alternatives) for each in scored],
        "text_offset": list(accumulate((len(token) for token, _ in scored[:-1]), initial=offset)),
    }


def _alternatives(token: Token, logprob: float, most: int) -> dict[str, float]:
    """The *most* likely ones, and *token* itself. Of two with one text the likelier counts."""
    told: dict[str, float] = {}
    for text, each in (*token.top_logprobs[:most], (str(token), logprob)):
        told.setdefault(text, finite_logprob(each))
    return told


def _finish_reason(reason: str, *, was_refused: bool) -> str:
    """*reason* in the words of this route, which knows no tool calls."""
    if reason not in ("stop", "tool_calls"):
        return reason
    return "content_filter" if was_refused else "stop"


class _EchoingText(TextRenderer):
    """The text of choice 0, after its prompt where that is echoed."""

    def __init__(self, prompt: str = "") -> None:
        self._prompt = prompt

    def start(self) -> bytes:
        return self._prompt.encode()


class _CompletionRenderer(ChunkRenderer):
    """`text_completion` frames."""

    text_head = b'"text":'
    text_tail = b',"logprobs":null,"finish_reason":null}'
    no_content: ClassVar = {"text": ""}

    def __init__(self, completion: ParsedCompletion, framing: Framing, created: int) -> None:
        request = completion.request
        envelope = {
            "id": answer_id(request, COMPLETION),
            "object": "text_completion",
            "created": created,
            "model": request.model,
            "system_fingerprint": FINGERPRINT,
        }
        counts = [each.n for each in completion.requests]
        super().__init__(envelope, framing, sum(counts), include_usage=completion.include_usage)
        self._echoed = [
            prompt for prompt, n in zip(completion.echoed, counts, strict=False) for _ in range(n)
        ]
        self._alternatives = completion.logprobs
        self._offsets: dict[int, int] = {}
        self._refused: set[int] = set()

    def start(self) -> bytes:
        return b"".join(self._text(prompt, choice) for choice, prompt in enumerate(self._echoed))

    def render(self, item: Item) -> bytes:
        if type(item) is str:
            return self._text(item, 0)
        if isinstance(item, str):
            return self._token(item)
        if isinstance(item, Finish):
            return self._finish(item.choice, item.reason)
        if isinstance(item, Refusal) and item.text:
            self._refused.add(item.choice)
        return b""

    def _token(self, item: str) -> bytes:
        text = str.__str__(item)  # not str(): a subclass may have a __str__ of its own
        if self._alternatives is None or not isinstance(item, Token) or item.logprob is None:
            return self._text(text, getattr(item, "choice", 0))
        offset = self._offsets.get(item.choice, 0)
        self._offsets[item.choice] = offset + len(text)
        logprobs = _logprobs([item], self._alternatives, offset)
        return self._chunk(item.choice, {"text": text}, logprobs=logprobs)

    def _finish(self, choice: int, reason: str) -> bytes:
        was_refused = choice in self._refused
        return super()._finish(choice, _finish_reason(reason, was_refused=was_refused))
