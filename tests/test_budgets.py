"""What a request's headers may ask of its budgets."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.datastructures import Headers

from flask_llmstream import InvalidRequestError
from flask_llmstream.budgets import budgets_of
from flask_llmstream.config import Settings
from flask_llmstream.core.deadlines import Budgets

SETTINGS = Settings(
    deadline_seconds=300, max_deadline_seconds=3600, first_token_seconds=60, idle_seconds=50
)


def budgets(*, streams=True, settings=SETTINGS, **headers):
    named = {name.replace("_", "-"): str(value) for name, value in headers.items()}
    return budgets_of(Headers(named), settings, streams=streams)


def test_without_headers_the_settings_count():
    assert budgets() == Budgets(300, 60, 50)


@pytest.mark.parametrize(
    "header", ["X-Request-Timeout", "X-Stainless-Timeout", "X-Litellm-Timeout"]
)
@pytest.mark.parametrize(
    ("asked", "given"), [("5", 5), ("0.5", 0.5), ("900", 900), ("3600", 3600), ("1e12", 3600)]
)
def test_a_client_may_shorten_the_total_and_lengthen_it_to_the_maximum(header, asked, given):
    assert budgets(**{header: asked}) == Budgets(given, 60, 50)


def test_of_several_totals_the_shortest_counts():
    assert budgets(X_Request_Timeout=9, X_Stainless_Timeout=8).total_seconds == 8


def test_our_own_header_must_make_sense():
    for value in ["", "0", "-1", "NOT_GIVEN", "nan", "inf", "-inf", "1e400", "5s", "5,6", "0x5"]:
        with pytest.raises(InvalidRequestError, match="positive number of seconds") as caught:
            budgets(X_Request_Timeout=value)
        assert caught.value.param == "X-Request-Timeout"


@pytest.mark.parametrize(
    "header",
    [
        "X-Stainless-Timeout",
        "X-Stainless-Read-Timeout",
        "X-Litellm-Timeout",
        "X-Litellm-Stream-Timeout",
    ],
)
@pytest.mark.parametrize("value", ["", "0", "-1", "NOT_GIVEN", "nan", "inf", "None", "1e400"])
def test_what_sdks_send_where_they_mean_nothing_is_ignored(header, value):
    assert budgets(**{header: value}) == budgets()


def test_a_read_timeout_is_the_longest_gap_of_a_stream():
    assert budgets(X_Stainless_Read_Timeout="7.5") == Budgets(300, 7.5, 7.5)


def test_a_read_timeout_is_the_whole_of_a_document():
    assert budgets(streams=False, X_Stainless_Read_Timeout=7.5) == Budgets(7.5, 60, 50)


@pytest.mark.parametrize("streams", [True, False])
def test_openai_py_s_standing_read_timeout_changes_nothing(streams):
    assert budgets(streams=streams, X_Stainless_Read_Timeout=600) == budgets()


def test_litellm_s_stream_timeout_is_the_first_token_s():
    assert budgets(X_Litellm_Stream_Timeout=7) == Budgets(300, 7, 50)
    assert budgets(X_Litellm_Stream_Timeout=70) == budgets()


def test_the_maximum_caps_the_app_s_own_deadline_too():
    settings = Settings(deadline_seconds=7200, max_deadline_seconds=3600)
    assert budgets(settings=settings).total_seconds == 3600


header_values = st.one_of(
    st.floats().map(str), st.text("0123456789.eE+-_ naif", max_size=8), st.none()
)


@given(
    st.fixed_dictionaries(
        dict.fromkeys(
            [
                "X-Stainless-Timeout",
                "X-Stainless-Read-Timeout",
                "X-Litellm-Timeout",
                "X-Litellm-Stream-Timeout",
            ],
            header_values,
        )
    ),
    st.booleans(),
)
def test_whatever_is_sent_budgets_are_positive_and_within_the_app_s(headers, streams):
    given = {name: value for name, value in headers.items() if value is not None}
    total, first, idle = (
        getattr(budgets(streams=streams, **given), name)
        for name in ("total_seconds", "first_token_seconds", "idle_seconds")
    )
    assert 0 < total <= 3600 < inf
    assert 0 < first <= 60
    assert 0 < idle <= 50
