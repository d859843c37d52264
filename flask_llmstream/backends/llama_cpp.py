"""A model inside the process: llama.cpp, through the `xllamacpp` binding."""

from __future__ import annotations

import secrets
import tempfile
import weakref
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from .. import models
from ..core import runtime
from ..core.messages import InferenceResponse
from ..exceptions import (
    ConfigurationError,
    EngineClosedError,
    InvalidRequestError,
)
from .llama_chat import AnswerReader, chat_body
from .tool_grammar import Toolbox

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from ..core.messages import InferenceRequest

__all__ = ["LlamaCppBackend"]

# Tokens of the prompt between two chances to cancel: half a second on one slow core.
_BATCH_TOKENS = 64
_CLOSE_SECONDS = 5.0


class LlamaCppBackend:
    """
    Generates with a GGUF model on this machine's processors.

    The model is loaded once per process, by the first request or by `load`, and shared:
    up to *parallel* sequences are decoded together. Give the engine no more
    ``worker_threads`` than that. A request that llama.cpp holds back because its slots
    are taken cannot be cancelled while it waits there, one in the engine's queue can.

    Memory is the file's size plus the context of every slot: about 350 MB for SmolLM2
    with the defaults, half of it for 4 x 2,048 tokens.

    Load it after fork, never before. llama.cpp's threads do not survive a fork: a child
    loads the model anew, yet hangs when it exits. Creating the backend before is fine.

    Tool calls work with any model: a required or named call is decoded under a JSON
    schema, whatever the model would rather say; with ``auto`` it is up to the model, and
    SmolLM2 mostly answers in prose. Stop strings are the engine's business.

    Args:
        model: A name of `flask_llmstream.models.MODELS`, or the path of a GGUF file.
        context_tokens: Prompt and answer of one request; llama.cpp rounds it up to a
            multiple of 256 and ends an answer that reaches it with ``length``.
        parallel: Sequences decoded at a time; a request with `n` choices takes `n`.
        threads: Processor threads. More than one pays only on cores that nothing else
            uses: two OpenMP threads that share one fall to a tenth of the speed of one.

    Attributes:
        context_tokens: As given.

    Raises:
        ConfigurationError: `xllamacpp` is not installed, or a value is out of range.

    Thread safety: every method, on native threads only: they wait without letting
    greenlets run. `is_loaded` from anywhere.
    """

    worker = "thread"
    supports = frozenset({"tools", "n", "logprobs", "json_object", "json_schema"})

    def __init__(
        self,
        model: str | os.PathLike[str] = "smollm2",
        *,
        context_tokens: int = 2048,
        parallel: int = 4,
        threads: int = 1,
    ) -> None:
        for name, value in (
            ("context_tokens", context_tokens),
            ("parallel", parallel),
            ("threads", threads),
        ):
            if value < 1:
                raise ConfigurationError(f"{name} must be at least 1, not {value!r}.")
        self.context_tokens = context_tokens
        self._model = model
        self._parallel = parallel
        self._threads = threads
        self._xllamacpp = _import_xllamacpp()
        # Guards _loaded, for as long as a load takes: no greenlet may wait for it.
        self._lock = runtime.allocate_lock()
        self._loaded: _LoadedModel | None = None
        self._unload: weakref.finalize[Any, LlamaCppBackend] | None = None
        self._inherited: _LoadedModel | None = None
        self._is_closed = False
        runtime.after_fork(self)

    @property
    def is_loaded(self) -> bool:
        """Whether a request would find the model in memory. Takes no lock."""
        return self._loaded is not None

    def check_ready(self) -> None:
        """
        Whether a request could be answered. It does not load: that would stop the process
        for seconds, in the middle of a health check. Any thread or greenlet.

        Raises:
            ConfigurationError: The file is missing; tells what to do.
            EngineClosedError: After `close`.
        """
        if self._is_closed:
            raise EngineClosedError("The model was closed.")
        if not self.is_loaded:
            self._find()

    def load(self) -> None:
        """
        Load the model now, where it is not; it takes seconds for a large one.

        llama.cpp keeps the GIL all the while, so nothing else in the process runs: call
        it before the process serves, from gunicorn's ``post_worker_init`` hook say.

        Raises:
            ConfigurationError: The file is missing or is no model; tells what to do.
            EngineClosedError: After `close`.
        """
        self._get_loaded()

    def close(self) -> None:
        """Cancel what runs, wait for it for up to 5 s, free the model. For good."""
        with self._lock:
            self._is_closed = True
            self._loaded = None
        if self._unload is not None:
            self._unload()

    def generate(self, request: InferenceRequest) -> InferenceResponse:
        """
        Answer *request* through its `stream_callback`.

        Returns:
            The usage, and nothing else: the answer's items have gone to the callback.
            So a run that the callback stopped has its usage as well.

        Raises:
            InvalidRequestError: The prompt does not fit the context (with the code
                ``context_length_exceeded``), `n` is over *parallel*, or llama.cpp
                cannot use a JSON schema.
            ConfigurationError: See `load`.
            EngineClosedError: `close` was called.
        """
        emit = request.stream_callback
        if emit is None:
            raise ValueError("LlamaCppBackend needs request.stream_callback. An engine sets it.")
        if request.n > self._parallel:
            raise InvalidRequestError(f"n must be at most {self._parallel}.", param="n")
        toolbox = Toolbox.of(request)
        body = chat_body(request, toolbox)
        reader = AnswerReader(request, toolbox)

        def on_chunk(chunk: Mapping[str, Any]) -> bool:
            if request.cancelled:
                return False
            for item in reader.read(chunk):
                if emit(item) is False:
                    return False
            return not reader.is_complete

        self._get_loaded().chat(body, on_chunk)
        return InferenceResponse(
            request_id=request.request_id, model=request.model, usage=reader.usage
        )

    def count_tokens(self, request: InferenceRequest) -> int:
        """
        How many tokens *request*'s prompt has, chat template and tools included; also one
        that is too long for the context.

        llama.cpp tells in a slot only, so this waits where all of them are taken, and as
        `generate` it cannot be cancelled while it does. In a slot it takes milliseconds.

        Raises:
            ConfigurationError: See `load`.
            EngineClosedError: `close` was called.
        """
        body = {**chat_body(request, Toolbox.of(request)), "n": 1}
        totals: list[int] = []

        def on_chunk(chunk: Mapping[str, Any]) -> bool:
            # The first one, which comes before the prompt is looked at.
            totals.append(chunk["prompt_progress"]["total"])
            return False

        try:
            self._get_loaded().chat(body, on_chunk)
        except _PromptTooLongError as error:
            return error.prompt_tokens
        return totals[0]

    def _get_loaded(self) -> _LoadedModel:
        loaded = self._loaded
        if loaded is not None:
            return loaded
        with self._lock:
            if self._is_closed:
                raise EngineClosedError("The model was closed.")
            if self._loaded is None:
                self._loaded = loaded = self._open()
                # At exit too: a process that ends in the middle of a decode crashes.
                self._unload = weakref.finalize(self, loaded.close)
            return self._loaded

    def _open(self) -> _LoadedModel:
        path = self._find()
        params = self._xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_parallel = self._parallel
        params.n_ctx = self.context_tokens * self._parallel
        params.n_batch = params.n_ubatch = _BATCH_TOKENS
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self._threads
        # A cache of finished prompts, 8 GiB by default. Every slot keeps its last prompt
        # anyway, which is what the next turn of a chat continues.
        params.cache_ram_mib = 0
        params.verbosity = -1
        # It cannot do without an HTTP server of its own. So that one gets a Unix socket
        # in a private directory, which is gone again before anyone could connect.
        params.api_keys = [secrets.token_hex(32)]
        params.n_threads_http = 1
        params.ui = params.endpoint_slots = False
        with tempfile.TemporaryDirectory(
            prefix="llmstream-", ignore_cleanup_errors=True
        ) as directory:
            params.hostnames = [f"{directory}/llama.sock"]
            try:
                server = self._xllamacpp.Server(params)
            except RuntimeError as exc:
                raise ConfigurationError(
                    f"llama.cpp cannot load {path.name}. Is it a whole GGUF file, is there "
                    "memory for it, and is TMPDIR a short path that can be written to?"
                ) from exc
        return _LoadedModel(server, path)

    def _find(self) -> Path:
        if isinstance(self._model, str) and self._model in models.MODELS:
            return models.path(self._model)
        path = Path(self._model)
        if not path.is_file():
            # Not the whole path: this reaches clients.
            raise ConfigurationError(
                f"There is no model file {path.name}. Check the path that LlamaCppBackend was "
                "given, or run `flask llmstream model install` and use its model's name."
            )
        return path

    def _after_fork(self) -> None:
        self._lock = runtime.allocate_lock()
        # Kept, since to free it would wait for threads that are not here.
        self._inherited = self._loaded or self._inherited
        self._loaded = None
        if self._unload is not None:
            self._unload.detach()
            self._unload = None


class _PromptTooLongError(InvalidRequestError):
    code = "context_length_exceeded"
    prompt_tokens = 0


class _LoadedModel:
    """llama.cpp's server with a model in it, and the runs under way. Belongs to a process."""

    def __init__(self, server: Any, path: Path) -> None:
        self._server = server
        self._path = path
        self._running: set[Any] = set()  # locks, each held until its run is over
        self._is_closing = False

    def chat(self, body: Mapping[str, Any], on_chunk: Callable[[Mapping[str, Any]], bool]) -> None:
        """
        Run one request. Calls ``on_chunk(chunk)`` on this thread until it says False.

        Raises:
            InvalidRequestError: llama.cpp refuses the request.
            Exception: What *on_chunk* raised.
        """
        failures: list[BaseException] = []

        def callback(chunk: Mapping[str, Any]) -> bool:
            """Returns whether to cancel. An exception would vanish in here."""
            if self._is_closing:
                return True
            try:
                if "error" in chunk:
                    raise self._as_error(chunk["error"])
                return not on_chunk(chunk)
            except BaseException as exc:
                failures.append(exc)
                return True

        run = runtime.allocate_lock()
        run.acquire()
        self._running.add(run)
        try:
            server = self._server
            if not self._is_closing:
                server.handle_chat_completions(body, callback)
        except ValueError as exc:
            raise self._refusal(str(exc)) from exc
        finally:
            self._running.discard(run)
            run.release()
        if failures:
            raise failures[0]
        if self._is_closing:
            raise EngineClosedError("The model was closed.")

    def close(self) -> None:
        """Cancel the runs, wait for them, free the model."""
        self._is_closing = True
        until = monotonic() + _CLOSE_SECONDS
        for run in tuple(self._running):
            run.acquire(True, max(0.0, until - monotonic()))
        self._server = None

    def _as_error(self, error: Mapping[str, Any]) -> Exception:
        if error.get("type") == "exceed_context_size_error":
            too_long = _PromptTooLongError(
                f"The prompt has {error['n_prompt_tokens']} tokens; the model's context holds "
                f"{error['n_ctx']}, the answer included. Shorten the prompt.",
                param="messages",
            )
            too_long.prompt_tokens = error["n_prompt_tokens"]
            return too_long
        message = str(error.get("message", ""))
        if error.get("code") == 400:
            return self._refusal(message)
        return RuntimeError(f"llama.cpp failed: {message}")

    def _refusal(self, message: str) -> InvalidRequestError:
        # What stands before it is about llama.cpp's parsers, nothing that a caller knows.
        message = message[max(0, message.find("JSON schema error")) :]
        return InvalidRequestError(message.replace(str(self._path), self._path.name))


def _import_xllamacpp() -> Any:
    try:
        import xllamacpp
    except ImportError as exc:
        if "libgomp" in str(exc):
            raise ConfigurationError(
                "llama.cpp needs the OpenMP runtime. Install the system package libgomp1 "
                "(Debian, Ubuntu: apt-get install libgomp1)."
            ) from exc
        raise ConfigurationError(
            "LlamaCppBackend needs xllamacpp. Run: pip install 'flask-llmstream[llamacpp]'"
        ) from exc
    return xllamacpp
