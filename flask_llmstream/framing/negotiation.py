"""Which framing an answer gets: `Accept` (RFC 9110 12.5.1) and the body's ``stream``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from ..exceptions import NotAcceptableError
from .frames import FRAMINGS, JSON, TEXT, Framing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["negotiate"]


def negotiate(
    accept: str | None,
    *,
    stream: bool | None,
    streams_by_default: bool,
    offers: Sequence[Framing] = FRAMINGS,
) -> Framing:
    """
    Choose how to frame an answer.

    Whether to stream:

    - What the body says goes, and `Accept` only picks the framing.
    - Where the body is silent, an `Accept` that names a streaming framing, and does not
      name JSON with the same weight or prefer it, asks for a stream.
    - Otherwise the dialect's default goes.

    Which framing a stream gets: the one that `Accept` rates highest, where a name beats a
    wildcard of the same weight and then the order of *offers* counts. Where `Accept` has
    room for none of them but for JSON, it is the first of *offers* that streams. That is
    not in RFC 9110, but every OpenAI and Anthropic SDK sends ``Accept: application/json``
    while streaming.

    `Accept` is a hard limit otherwise: with ``stream: false`` and no room for JSON the
    answer is framed as `Accept` has it, and the other way about.

    Args:
        accept: The header's value, several headers joined by commas. None, or a value
            without one valid media range, accepts everything.
        stream: What the body says; None where it is silent.
        streams_by_default: What the dialect does where nobody says.
        offers: What the route can produce, the dialect's own streaming framing first.

    Raises:
        NotAcceptableError: `Accept` names nothing that the route can produce.
    """
    ranges = list(_media_ranges(accept or "")) or [_ANYTHING]
    json = _rate(JSON, ranges)
    ratings = {offer: _rate(offer, ranges) for offer in offers if offer.streams}
    if json.named and TEXT in ratings and ratings[TEXT].q <= json.q:
        # Generic clients list both and mean no framing: axios and Angular send
        # "application/json, text/plain, */*", Spring much the same. To get text from a
        # stream beside JSON, rate it higher.
        ratings[TEXT] = ratings[TEXT]._replace(q=0.0)

    streaming = max(
        (offer for offer, rating in ratings.items() if rating.q),
        key=lambda offer: (ratings[offer].q, ratings[offer].named),
        default=None,
    )
    asks_for_stream = (
        streaming is not None
        and ratings[streaming].named
        and (ratings[streaming].q, True) > (json.q, json.named)
    )
    if streaming is None and json.q:
        streaming = next((o for o, rating in ratings.items() if not rating.refused), None)
    document = JSON if json.q and JSON in offers else None

    if stream is None:
        stream = asks_for_stream or streams_by_default
    choice = (streaming or document) if stream else (document or streaming)
    if choice is None:
        raise NotAcceptableError(
            "Accept names nothing that this route can produce; it offers "
            + ", ".join(offer.content_type for offer in offers)
            + "."
        )
    return choice


class _MediaRange(NamedTuple):
    type: str
    subtype: str
    parameters: tuple[tuple[str, str], ...]
    q: float

    @property
    def specificity(self) -> tuple[int, int]:
        """RFC 9110 12.5.1: the most specific range that covers a type has precedence."""
        return 2 - (self.type, self.subtype).count("*"), len(self.parameters)

    def covers(self, framing: Framing) -> bool:
        type, _, subtype = framing.content_type.partition(";")[0].partition("/")
        return (
            self.type in (type, "*")
            and self.subtype in (subtype, "*")
            # Everything that we send is UTF-8, whether or not its type has a charset
            # parameter; no framing has any other.
            and all(parameter in _UTF_8 for parameter in self.parameters)
        )


class _Rating(NamedTuple):
    """What `Accept` says of one framing; *named* means not by a wildcard."""

    q: float
    named: bool
    refused: bool


_ANYTHING = _MediaRange("*", "*", (), 1.0)
_UNRATED = _Rating(0.0, named=False, refused=False)
_UTF_8 = frozenset({("charset", "utf-8"), ("charset", "utf8")})


def _rate(framing: Framing, ranges: Sequence[_MediaRange]) -> _Rating:
    covering = [media_range for media_range in ranges if media_range.covers(framing)]
    if not covering:
        return _UNRATED
    best = max(covering, key=lambda media_range: (media_range.specificity, media_range.q))
    return _Rating(best.q, named=best.subtype != "*", refused=best.q == 0)


# The quoted string also takes an unterminated rest, so that no input makes it backtrack.
_QUOTED = r'"(?:[^"\\]|\\.)*(?:"|\\?$)'
_ELEMENT = re.compile(rf"(?:{_QUOTED}|[^,\"])+", re.DOTALL)
_PARAMETER = re.compile(rf"(?:{_QUOTED}|[^;\"])+", re.DOTALL)
_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # noqa: S105 - RFC 9110 5.6.2
_TYPE = re.compile(rf"({_TOKEN})/({_TOKEN})")
# More digits than RFC 9110 12.4.2 allows are harmless; ".2" is what Java's HttpURLConnection
# has always sent.
_WEIGHT = re.compile(r"0?\.[0-9]+|0\.?|1(?:\.0*)?")


def _media_ranges(accept: str) -> Iterator[_MediaRange]:
    """The valid ranges; a malformed one is skipped, for the others still mean something."""
    for element in _ELEMENT.findall(accept):
        name, *rest = [part.strip(" \t") for part in _PARAMETER.findall(element)] or [""]
        if name == "*":  # also HttpURLConnection's
            name = "*/*"
        match = _TYPE.fullmatch(name.lower())
        if match is None or (match[1] == "*" and match[2] != "*"):
            continue
        parameters = [_parameter(part) for part in rest if part]
        # RFC 9110 12.5.1: a parameter named q is the weight wherever it stands.
        weights = [value for key, value in parameters if key == "q"]
        if any(_WEIGHT.fullmatch(weight) is None for weight in weights):
            continue
        yield _MediaRange(
            match[1],
            match[2],
            tuple(parameter for parameter in parameters if parameter[0] != "q"),
            float(weights[0]) if weights else 1.0,
        )


def _parameter(part: str) -> tuple[str, str]:
    """Name and value, both in lower case: so are charsets and weights compared."""
    name, _, value = part.partition("=")
    value = value.strip(" \t")
    if value.startswith('"'):
        value = re.sub(r"\\(.)", r"\1", value.strip('"'))
    return name.strip(" \t").lower(), value.lower()
