"""Stop strings in streamed text."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flask_llmstream.core.stopping import StopFilter


def reference(text, stops):
    """Read character by character: what is shown, and the stop string that ended it."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)  # Starts first.
            return text[: end - len(longest)], longest
    return text, None


def feed_all(stops, pieces):
    stop_filter = StopFilter(stops)
    shown = [stop_filter.feed(piece) for piece in pieces]
    return "".join(shown) + stop_filter.flush(), stop_filter.matched


def split(text, cuts):
    """*text* in pieces, empty ones among them."""
    places = sorted(min(cut, len(text)) for cut in cuts)
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


# Few letters, so that stop strings overlap, repeat and contain each other.
texts = st.text("ab\n", max_size=24)
stops = st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4)
cuts = st.lists(st.integers(0, 24), max_size=12)


@given(texts, stops, cuts)
@example("aab", ["ab"], [1, 2])
@example("abab", ["bb", "aba"], [1, 2, 3])
@example("aaab", ["aab", "b"], [])
def test_any_split_gives_what_reading_by_character_gives(text, stops, cuts):
    assert feed_all(stops, split(text, cuts)) == reference(text, stops)


@given(texts, stops, cuts)
def test_no_stop_string_is_ever_shown(text, stops, cuts):
    shown, _ = feed_all(stops, split(text, cuts))

    assert not any(stop in shown for stop in stops)


@given(texts, stops, cuts)
def test_only_a_proper_prefix_of_a_stop_string_is_held_back(text, stops, cuts):
    stop_filter = StopFilter(stops)
    fed = shown = ""
    for piece in split(text, cuts):
        fed += piece
        shown += stop_filter.feed(piece)
        held = stop_filter._held
        assert stop_filter.is_holding is bool(held)
        if stop_filter.matched is None:
            assert shown + held == fed
            assert not held or any(stop.startswith(held) and stop != held for stop in stops)
        else:
            assert not held


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=4), max_size=3), cuts)
def test_any_text_and_any_stop_strings(text, stops, cuts):
    assert feed_all(stops, split(text, cuts)) == reference(text, stops)


@pytest.mark.parametrize(
    ("text", "stops", "shown", "matched"),
    [
        ("one END two", ["END"], "one ", "END"),
        ("one EN two", ["END"], "one EN two", None),
        ("ends with EN", ["END"], "ends with EN", None),
        ("ENEND", ["END"], "EN", "END"),
        ("xabcd", ["bcd", "ab"], "x", "ab"),  # The one that is complete first,
        ("xabcd", ["bcd", "cd"], "xa", "bcd"),  # of two at once the one that starts first.
        ("abcd", ["abcd", "bc"], "a", "bc"),
        ("", ["a"], "", None),
        ("\N{FAMILY}\N{BEAR FACE}", ["\N{BEAR FACE}"], "\N{FAMILY}", "\N{BEAR FACE}"),
    ],
)
def test_examples_split_at_every_character(text, stops, shown, matched):
    assert feed_all(stops, list(text)) == (shown, matched)
    assert feed_all(stops, [text]) == (shown, matched)


def test_nothing_is_shown_after_a_match():
    stop_filter = StopFilter(["."])

    assert stop_filter.feed("a.b") == "a"
    assert stop_filter.feed("c") == ""
    assert stop_filter.flush() == ""


def test_without_stop_strings_everything_is_shown():
    stop_filter = StopFilter([])

    assert stop_filter.feed("text") == "text"
    assert not stop_filter.is_holding


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        StopFilter(["a", ""])
