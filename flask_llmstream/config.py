"""The settings of an app, checked once: ``LLMSTREAM_…`` in `app.config`."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from math import inf
from typing import TYPE_CHECKING, Any

from .engines.admission import BackpressurePolicy
from .exceptions import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, MutableMapping

__all__ = ["PREFIX", "ApiKeys", "Settings", "check_values", "model_ids"]

PREFIX = "LLMSTREAM_"


class ApiKeys:
    """
    Who may call: named keys, kept as digests.

    Args:
        keys: A mapping name → key, a sequence of keys (named ``key-1``, …), or one key.
            White space around a key does not count: files end in a newline.

    Raises:
        ConfigurationError: There is no key, or one is empty, no string or beyond ASCII.

    Thread safety: immutable.
    """

    def __init__(self, keys: Mapping[str, str] | Sequence[str] | str) -> None:
        if isinstance(keys, str):
            keys = [keys]
        if not isinstance(keys, Mapping):
            keys = {f"key-{number}": key for number, key in enumerate(keys, 1)}
        # Beyond ASCII no client could send it: RFC 6750 2.1.
        if not keys or not all(
            isinstance(key, str) and key.strip() and key.isascii() for key in keys.values()
        ):
            raise ConfigurationError(
                f"{PREFIX}API_KEYS must be a dict of names and keys, a list of keys or one key, "
                "in ASCII, none of them empty. Leave it unset to let everyone in."
            )
        self._digests = {name: sha256(key.strip().encode()).digest() for name, key in keys.items()}

    def __repr__(self) -> str:
        return f"<ApiKeys {', '.join(map(str, self._digests))}>"

    def name_of(self, key: str) -> str | None:
        """
        The name of *key*; None where it is none of ours.

        Every key is compared, each in constant time: the time taken tells nothing.
        """
        digest = sha256(key.encode(errors="surrogatepass")).digest()
        found = None
        for name, known in self._digests.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found


def _at_least(
    least: float, *, whole: bool = False, none: str = ""
) -> tuple[str, Callable[[Any], Any]]:
    kind = "a whole number" if whole else "a number"
    allowed = f"{kind}, at least {least:g}" if least else f"{kind}, 0 or more"
    if none:
        allowed += f", or None ({none})"

    def check(value: Any) -> Any:
        if value is None and none:
            return value
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise TypeError
        if not least <= value < inf:
            raise ValueError
        return value

    return allowed, check


def _above_zero() -> tuple[str, Callable[[Any], Any]]:
    def check(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError
        if not 0 < value < inf:
            raise ValueError
        return value

    return "a number of seconds above 0", check


def _share() -> tuple[str, Callable[[Any], Any]]:
    def check(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError
        if not 0 < value <= 1:
            raise ValueError
        return value

    return "a number above 0, at most 1", check


def _check_model(value: Any) -> Any:
    if not isinstance(value, str):
        raise TypeError
    return value


def _check_keys(value: Any) -> ApiKeys | None:
    return value if value is None or isinstance(value, ApiKeys) else ApiKeys(value)


_POLICIES = ", ".join(f'"{policy.value}"' for policy in BackpressurePolicy)


def _setting(default: Any, rule: tuple[str, Callable[[Any], Any]]) -> Any:
    return field(default=default, metadata={"rule": rule})


_OF_THE_APP = frozenset(
    {
        "worker_threads",
        "queue_size",
        "backpressure",
        "block_timeout_seconds",
        "identity_queue_share",
        "stuck_seconds",
        "resume_bytes",
        "shutdown_grace_seconds",
    }
)
"""Settings of the engines and the process, which routes share."""


@dataclass(frozen=True, slots=True)
class Settings:
    """
    Every setting with its default; times in seconds, sizes in bytes.

    Thread safety: immutable.
    """

    default_model: str = _setting("", ("a model id, or empty for the first one", _check_model))
    worker_threads: int = _setting(4, _at_least(1, whole=True))
    queue_size: int = _setting(1000, _at_least(0, whole=True))
    backpressure: BackpressurePolicy = _setting(
        "block", (f"one of {_POLICIES}", BackpressurePolicy)
    )
    block_timeout_seconds: float | None = _setting(
        5, _at_least(0, none="until the request's deadline")
    )
    identity_streams: int | None = _setting(None, _at_least(1, whole=True, none="no limit"))
    identity_queue_share: float = _setting(1, _share())
    channel_size: int = _setting(256, _at_least(1, whole=True))
    channel_bytes: int = _setting(256 * 1024, _at_least(1, whole=True))
    slow_reader_seconds: float = _setting(30, _above_zero())
    deadline_seconds: float = _setting(300, _above_zero())
    max_deadline_seconds: float = _setting(3600, _above_zero())
    first_token_seconds: float = _setting(60, _above_zero())
    idle_seconds: float = _setting(60, _above_zero())
    heartbeat_seconds: float = _setting(15, _at_least(0))
    stuck_seconds: float = _setting(30, _at_least(0))
    coalesce_seconds: float = _setting(0, _at_least(0))
    resume_seconds: float = _setting(0, _at_least(0))
    resume_bytes: int = _setting(64 * 1024 * 1024, _at_least(1, whole=True))
    stored_responses: int = _setting(1000, _at_least(0, whole=True))
    stored_bytes: int = _setting(64 * 1024 * 1024, _at_least(1, whole=True))
    stored_seconds: float = _setting(3600, _above_zero())
    shutdown_grace_seconds: float | None = _setting(None, _at_least(0, none="the server's own"))
    max_request_bytes: int = _setting(1024 * 1024, _at_least(1, whole=True))
    max_tokens_limit: int | None = _setting(None, _at_least(1, whole=True, none="no limit"))
    api_keys: ApiKeys | None = _setting(
        None, ("a dict of names and keys, a list of keys, or one key", _check_keys)
    )

    @classmethod
    def from_config(cls, config: MutableMapping[str, Any]) -> Settings:
        """
        Read an app's config, setting the defaults that it lacks.

        Raises:
            ConfigurationError: Names the setting, its value and what is allowed.
        """
        for each in fields(cls):
            config.setdefault(PREFIX + each.name.upper(), each.default)
        values = {each.name: config[PREFIX + each.name.upper()] for each in fields(cls)}
        return cls().narrowed(values, prefix=PREFIX)

    def narrowed(self, values: Mapping[str, Any], *, prefix: str = "") -> Settings:
        """These settings with *values* checked and put over them."""
        return replace(self, **check_values(values, prefix=prefix))


def check_values(values: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """
    *values* by setting name, as `Settings` keeps them.

    Args:
        values: As they stand in the config, or as a blueprint's arguments.
        prefix: ``LLMSTREAM_`` where they come from the config, empty for arguments.

    Raises:
        ConfigurationError: Names the setting, its value and what is allowed.
    """
    rules = {each.name: each.metadata["rule"] for each in fields(Settings)}
    checked: dict[str, Any] = {}
    for name, value in values.items():
        shown_name = prefix + name.upper() if prefix else name
        if name not in rules:
            raise ConfigurationError(
                f"There is no setting {shown_name}. There are {', '.join(sorted(rules))}."
            )
        if name in _OF_THE_APP and not prefix:
            raise ConfigurationError(
                f"{name} is not a blueprint's to say. Set {PREFIX}{name.upper()} for the whole app."
            )
        allowed, check = rules[name]
        try:
            checked[name] = check(value)
        except (TypeError, ValueError) as exc:
            # Never a key's text: it may end up in a log.
            shown = "" if name == "api_keys" else f", not {value!r}"
            raise ConfigurationError(f"{shown_name} must be {allowed}{shown}.") from exc
    return checked


def model_ids(models: Iterable[str]) -> tuple[str, ...]:
    """
    An argument ``models``.

    Raises:
        ConfigurationError: It is one string, which would be a model a letter.
    """
    if isinstance(models, str):
        raise ConfigurationError(f"models must be a list of model ids, not {models!r}.")
    return tuple(models)
