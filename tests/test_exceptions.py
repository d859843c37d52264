"""The tree of errors, its table, and what each one looks like as an HTTP response."""

import json
import pickle

import pytest
from flask_apps import make_app

from flask_llmstream import LLMStream, LLMStreamError, exceptions

TABLE = [
    line.split()
    for line in exceptions.__doc__.split("====\n")[2].splitlines()
    if line.strip() and not line.startswith("=")
]
"""The rows of the docstring's table: class, status, code, whether a retry helps."""

ERRORS = [getattr(exceptions, name) for name in exceptions.__all__]


def rows():
    return {name: (status, code, retry) for name, status, code, retry in TABLE}


def test_the_table_names_every_error_once():
    assert sorted(name for name, *_ in TABLE) == sorted(exceptions.__all__)


@pytest.mark.parametrize("error", ERRORS)
def test_the_table_says_what_the_classes_say(error):
    status, code, retry = rows()[error.__name__]
    assert status == ("none" if error.status is None else str(error.status))
    assert code == error.code
    assert retry == ("yes" if error.retryable else "no")


def test_the_table_s_indents_are_the_tree():
    stack = []
    for line in exceptions.__doc__.split("====\n")[2].splitlines():
        name = line.split()[0] if line.strip() else ""
        if not hasattr(exceptions, name):
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        del stack[depth:]
        error = getattr(exceptions, name)
        assert error.__bases__[0] is (stack[-1] if stack else Exception)
        stack.append(error)


@pytest.mark.parametrize(
    ("name", "status", "code", "retryable"),
    [
        ("ConfigurationError", 500, "configuration_error", False),
        ("InvalidRequestError", 400, "invalid_request", False),
        ("NotAcceptableError", 406, "not_acceptable", False),
        ("RequestTooLargeError", 413, "request_too_large", False),
        ("UnknownModelError", 404, "model_not_found", False),
        ("AuthenticationError", 401, "invalid_api_key", False),
        ("PermissionDeniedError", 403, "permission_denied", False),
        ("QueueFullError", 429, "queue_full", True),
        ("TooManyRequestsError", 429, "too_many_requests", True),
        ("RequestDroppedError", 503, "request_dropped", True),
        ("EngineClosedError", 503, "engine_closed", True),
        ("ServerShutdownError", 503, "server_shutdown", True),
        ("DeadlineExceededError", 504, "deadline_exceeded", False),
        ("FirstTokenTimeoutError", 504, "first_token_timeout", False),
        ("IdleTimeoutError", 504, "idle_timeout", False),
        ("RequestCancelledError", 499, "cancelled", False),
        ("EngineError", 500, "engine_error", True),
        ("UpstreamError", 502, "upstream_error", True),
        ("SlowReaderError", None, "slow_reader", True),
        ("IncompleteStreamError", None, "stream_incomplete", True),
    ],
)
def test_code_outside_may_rely_on_status_code_and_retryable(name, status, code, retryable):
    error = getattr(exceptions, name)("why")
    assert (error.status, error.code, error.retryable) == (status, code, retryable)


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_takes_a_message_retry_after_and_param(error):
    raised = error("why", retry_after=7, param="model")
    assert str(raised) == "why"
    assert (raised.retry_after, raised.param) == (7, "model")


@pytest.mark.parametrize(
    "error", [each for each in ERRORS if each is not exceptions.ConfigurationError]
)
def test_the_message_is_what_the_client_is_told(error):
    assert error("why").message == "why"


def test_an_error_without_a_message_is_called_by_its_name():
    assert exceptions.QueueFullError().message == "QueueFullError"


def test_a_deadline_is_the_built_in_timeout_error():
    with pytest.raises(TimeoutError):
        raise exceptions.IdleTimeoutError("too long")


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_survives_another_process(error):
    raised = error("why", retry_after=7, param="model")
    copy = pickle.loads(pickle.dumps(raised))
    assert type(copy) is error
    assert (str(copy), copy.retry_after, copy.param) == ("why", 7, "model")


def test_a_cancel_says_who_in_another_process_too():
    raised = exceptions.RequestCancelledError(cause="by_id")
    assert pickle.loads(pickle.dumps(raised)).cause == "by_id"
    assert exceptions.RequestCancelledError("why").cause == "app"


# As a response of an app's own view.


def response_to(error):
    app = make_app(LLMStream())

    @app.get("/")
    def view():
        raise error

    return app.test_client().get("/")


@pytest.mark.parametrize("error", [each for each in ERRORS if each.status is not None])
def test_left_alone_an_error_is_answered_as_json_with_its_status(error):
    response = response_to(error("why"))
    assert response.status_code == error.status
    assert response.content_type == "application/json"
    document = json.loads(response.data)["error"]
    assert (document["code"], document["retryable"]) == (error.code, error.retryable)
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Request-ID"]


@pytest.mark.parametrize("error", ERRORS)
def test_what_no_retry_can_mend_tells_the_sdks_so(error):
    response = response_to(error("why"))
    assert response.headers.get("x-should-retry") == (None if error.retryable else "false")


@pytest.mark.parametrize("error", ERRORS)
def test_429_and_503_say_when_to_come_back(error):
    response = response_to(error("why"))
    assert ("Retry-After" in response.headers) == (response.status_code in (429, 503))


@pytest.mark.parametrize(
    ("seconds", "header"), [(None, "1"), (0, "1"), (0.2, "1"), (1.5, "2"), (30, "30")]
)
def test_retry_after_is_whole_seconds_and_never_too_early(seconds, header):
    response = response_to(exceptions.QueueFullError("full", retry_after=seconds))
    assert response.headers["Retry-After"] == header


def test_any_error_may_say_when_to_come_back():
    response = response_to(exceptions.UpstreamError("overloaded", retry_after=20))
    assert response.headers["Retry-After"] == "20"


def test_a_quota_that_no_retry_can_mend_invites_none():
    class QuotaError(exceptions.QueueFullError):
        code = "quota"
        retryable = False

    response = response_to(QuotaError("no tokens left this month"))
    assert response.status_code == 429
    assert response.headers["x-should-retry"] == "false"
    assert "Retry-After" not in response.headers


def test_only_401_asks_for_credentials():
    response = response_to(exceptions.AuthenticationError("who?"))
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert "WWW-Authenticate" not in response_to(exceptions.PermissionDeniedError("no")).headers


def test_a_stream_error_before_its_stream_is_an_internal_error():
    assert response_to(exceptions.SlowReaderError("slow")).status_code == 500


def test_what_is_wrong_with_the_set_up_is_for_the_log_not_for_the_client(caplog):
    response = response_to(exceptions.ConfigurationError("There is no file /srv/model.gguf."))
    assert response.status_code == 500
    assert json.loads(response.data)["error"]["code"] == "configuration_error"
    assert b"/srv" not in response.data
    assert "/srv/model.gguf" in caplog.text


def test_a_view_may_handle_an_error_itself():
    app = make_app(LLMStream())

    @app.errorhandler(LLMStreamError)
    def handle(error):
        return error.code, 418

    @app.get("/")
    def view():
        raise exceptions.QueueFullError("full")

    response = app.test_client().get("/")
    assert (response.status_code, response.text) == (418, "queue_full")
