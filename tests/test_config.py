"""Settings: the defaults, what is refused at `init_app`, and who holds a key."""

from dataclasses import fields

import pytest
from flask import Flask
from flask_apps import make_app
from hypothesis import given
from hypothesis import strategies as st

from flask_llmstream import BackpressurePolicy, ConfigurationError, LLMStream
from flask_llmstream.config import PREFIX, ApiKeys, Settings, check_values

DEFAULTS = {
    "DEFAULT_MODEL": "",
    "WORKER_THREADS": 4,
    "QUEUE_SIZE": 1000,
    "BACKPRESSURE": "block",
    "BLOCK_TIMEOUT_SECONDS": 5,
    "IDENTITY_STREAMS": None,
    "IDENTITY_QUEUE_SHARE": 1,
    "CHANNEL_SIZE": 256,
    "CHANNEL_BYTES": 256 * 1024,
    "SLOW_READER_SECONDS": 30,
    "DEADLINE_SECONDS": 300,
    "MAX_DEADLINE_SECONDS": 3600,
    "FIRST_TOKEN_SECONDS": 60,
    "IDLE_SECONDS": 60,
    "HEARTBEAT_SECONDS": 15,
    "STUCK_SECONDS": 30,
    "COALESCE_SECONDS": 0,
    "RESUME_SECONDS": 0,
    "RESUME_BYTES": 64 * 1024 * 1024,
    "STORED_RESPONSES": 1000,
    "STORED_BYTES": 64 * 1024 * 1024,
    "STORED_SECONDS": 3600,
    "SHUTDOWN_GRACE_SECONDS": None,
    "MAX_REQUEST_BYTES": 1024 * 1024,
    "MAX_TOKENS_LIMIT": None,
    "API_KEYS": None,
}

WHOLE_ABOVE_ZERO = [
    "WORKER_THREADS",
    "IDENTITY_STREAMS",
    "CHANNEL_SIZE",
    "CHANNEL_BYTES",
    "RESUME_BYTES",
    "STORED_BYTES",
    "MAX_REQUEST_BYTES",
    "MAX_TOKENS_LIMIT",
]
WHOLE_OR_ZERO = ["QUEUE_SIZE", "STORED_RESPONSES"]
ABOVE_ZERO = [
    "SLOW_READER_SECONDS",
    "DEADLINE_SECONDS",
    "MAX_DEADLINE_SECONDS",
    "FIRST_TOKEN_SECONDS",
    "IDLE_SECONDS",
    "STORED_SECONDS",
]
ZERO_OR_MORE = [
    "BLOCK_TIMEOUT_SECONDS",
    "HEARTBEAT_SECONDS",
    "STUCK_SECONDS",
    "COALESCE_SECONDS",
    "RESUME_SECONDS",
    "SHUTDOWN_GRACE_SECONDS",
]
OPTIONAL = [
    "BLOCK_TIMEOUT_SECONDS",
    "SHUTDOWN_GRACE_SECONDS",
    "MAX_TOKENS_LIMIT",
    "API_KEYS",
    "IDENTITY_STREAMS",
]
NO_NUMBERS = ["5", b"5", [5], {}, object(), True, float("nan"), float("inf"), -1]

BAD = [
    *((name, value) for name in WHOLE_ABOVE_ZERO for value in [*NO_NUMBERS, 0, 1.5]),
    *((name, value) for name in WHOLE_OR_ZERO for value in [*NO_NUMBERS, 1.5]),
    *((name, value) for name in ABOVE_ZERO for value in [*NO_NUMBERS, 0, 0.0]),
    *((name, value) for name in ZERO_OR_MORE for value in NO_NUMBERS),
    *((name, None) for name in set(DEFAULTS) - set(OPTIONAL)),
    *(("IDENTITY_QUEUE_SHARE", value) for value in [*NO_NUMBERS, 0, 1.01]),
    *(("DEFAULT_MODEL", value) for value in [5, ["m"]]),
    *(("BACKPRESSURE", value) for value in ["", "drop", "BLOCK", 1, ["block"]]),
]


def settings_from(**config):
    return Settings.from_config({PREFIX + name: value for name, value in config.items()})


def test_init_app_sets_every_default():
    app = make_app(LLMStream())
    ours = {name: value for name, value in app.config.items() if name.startswith(PREFIX)}
    assert ours == {PREFIX + name: value for name, value in DEFAULTS.items()}


def test_init_app_leaves_what_is_set():
    app = make_app(LLMStream(), worker_threads=2, default_model="m")
    assert app.config["LLMSTREAM_WORKER_THREADS"] == 2
    assert app.config["LLMSTREAM_DEFAULT_MODEL"] == "m"


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: repr(value)[:30])
def test_a_bad_value_fails_at_init_app_with_its_name_its_value_and_what_is_allowed(name, value):
    app = Flask("tests")
    app.config[PREFIX + name] = value
    with pytest.raises(ConfigurationError) as caught:
        LLMStream(app)
    message = str(caught.value)
    assert message.startswith(f"{PREFIX}{name} must be ")
    assert message.endswith(f", not {value!r}.")
    assert "llmstream" not in app.extensions


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in WHOLE_ABOVE_ZERO for value in [1, 10**9]),
        *((name, value) for name in ABOVE_ZERO for value in [0.001, 1, 10**9]),
        *((name, value) for name in ZERO_OR_MORE for value in [0, 0.5, 10**9]),
        *((name, None) for name in OPTIONAL),
        ("QUEUE_SIZE", 0),
        *(("IDENTITY_QUEUE_SHARE", value) for value in [0.001, 0.5, 1, 1.0]),
        ("DEFAULT_MODEL", "m"),
    ],
)
def test_what_is_allowed_is_kept_as_it_is(name, value):
    assert getattr(settings_from(**{name: value}), name.lower()) == value


@pytest.mark.parametrize("policy", list(BackpressurePolicy))
def test_a_policy_may_be_named_or_given(policy):
    assert settings_from(BACKPRESSURE=policy.value).backpressure is policy
    assert settings_from(BACKPRESSURE=policy).backpressure is policy


def test_the_default_policy_is_a_policy():
    assert settings_from().backpressure is BackpressurePolicy.BLOCK


def test_an_unknown_setting_of_a_blueprint_is_refused_with_what_there_is():
    with pytest.raises(ConfigurationError, match="There is no setting dedline_seconds") as caught:
        LLMStream().openai_blueprint(dedline_seconds=3)
    assert "deadline_seconds" in str(caught.value)


def test_a_bad_setting_of_a_blueprint_is_refused_by_its_own_name():
    with pytest.raises(ConfigurationError, match=r"^deadline_seconds must be .*, not -1\.$"):
        LLMStream().openai_blueprint(deadline_seconds=-1)


@pytest.mark.parametrize(
    "name",
    [
        "worker_threads",
        "queue_size",
        "backpressure",
        "block_timeout_seconds",
        "stuck_seconds",
        "shutdown_grace_seconds",
    ],
)
def test_a_blueprint_refuses_what_belongs_to_an_engine_or_the_process(name):
    value = DEFAULTS[name.upper()]
    with pytest.raises(ConfigurationError, match=f"Set LLMSTREAM_{name.upper()} for the whole app"):
        LLMStream().openai_blueprint(**{name: value})


def test_every_setting_has_a_rule():
    values = {each.name: each.default for each in fields(Settings)}
    assert check_values(values, prefix=PREFIX) == {
        **values,
        "backpressure": BackpressurePolicy.BLOCK,
    }


# API keys.


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ("secret", {"secret": "key-1"}),
        (["one", "two"], {"one": "key-1", "two": "key-2"}),
        (("one", "two"), {"one": "key-1", "two": "key-2"}),
        ({"alice": "one", "bob": "two"}, {"one": "alice", "two": "bob"}),
    ],
)
def test_keys_are_one_string_a_list_or_a_dict_of_names(keys, names):
    api_keys = settings_from(API_KEYS=keys).api_keys
    assert {key: api_keys.name_of(key) for key in names} == names
    assert api_keys.name_of("other") is None


def test_one_string_is_one_key_not_a_list_of_letters():
    assert ApiKeys("abc").name_of("a") is None


@pytest.mark.parametrize(
    "keys",
    ["", " ", "\n", [], {}, [""], ["one", " "], {"a": ""}, {"a": None}, [b"one"], ["one", 2]],
    ids=repr,
)
def test_an_empty_key_is_refused_so_that_a_missing_variable_opens_no_door(keys):
    with pytest.raises(ConfigurationError, match=r"^LLMSTREAM_API_KEYS must be"):
        settings_from(API_KEYS=keys)


@pytest.mark.parametrize("keys", [5, True, object()], ids=repr)
def test_what_is_no_key_is_refused(keys):
    with pytest.raises(ConfigurationError, match=r"^LLMSTREAM_API_KEYS must be"):
        settings_from(API_KEYS=keys)


def test_a_key_that_no_header_can_carry_is_refused():
    with pytest.raises(ConfigurationError, match=r"^LLMSTREAM_API_KEYS must be") as caught:
        settings_from(API_KEYS=["clé"])
    assert "clé" not in str(caught.value)


def test_a_key_read_from_a_file_may_end_in_a_newline():
    assert ApiKeys("secret\n").name_of("secret") == "key-1"


def test_a_message_never_shows_a_key():
    with pytest.raises(ConfigurationError) as caught:
        settings_from(API_KEYS={"alice": "s3cret", "bob": ""})
    assert "s3cret" not in str(caught.value)


def test_neither_does_the_repr():
    assert "s3cret" not in repr(ApiKeys({"alice": "s3cret"}))
    assert "alice" in repr(ApiKeys({"alice": "s3cret"}))
    assert "s3cret" not in repr(settings_from(API_KEYS="s3cret"))


def test_a_name_may_be_any_object():
    assert repr(ApiKeys({7: "one"})) == "<ApiKeys 7>"


@given(st.text(), st.text())
def test_only_the_very_key_is_taken(key, other):
    if not key.strip() or not key.isascii():
        return
    assert (ApiKeys(key).name_of(other) is None) == (other != key.strip())
