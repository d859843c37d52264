"""How an app uses the package, for mypy: `tests/test_typing.py` checks it."""

from collections.abc import Iterator

from flask import Flask, Response
from typing_extensions import assert_type

from flask_llmstream import (
    AsyncInferenceEngine,
    Backend,
    CallbackBackend,
    EchoBackend,
    Emit,
    InferenceHandle,
    InferenceRequest,
    InferenceResponse,
    LLMStream,
    Message,
    Outcome,
    PermissionDeniedError,
    Token,
    Usage,
    request_finished,
)
from flask_llmstream.testing import Gate, ScriptedBackend
from flask_llmstream.tokens import TokenIterator

app = Flask(__name__)
llm = LLMStream(app)


@llm.backend("echo", worker="greenlet", supports={"n"}, worker_threads=2)
def echo(request: InferenceRequest) -> Iterator[str | Usage]:
    yield from request.last_user_text.split()
    yield Token("!", logprob=-0.1, top_logprobs=[("!", -0.1)])
    yield Usage(1, 2)


class Whole:
    def generate(self, request: InferenceRequest) -> InferenceResponse:
        return InferenceResponse(text=request.prompt)


class Batching:
    def submit(self, request: InferenceRequest, emit: Emit) -> object:
        emit("Hi")
        emit(ValueError())
        return lambda: None


whole: Backend = Whole()
scripted: Backend = ScriptedBackend("Hel", Gate(), "lo")
llm.add_backend("whole", whole, queue_size=3)
llm.add_backend("echo2", EchoBackend(tokens_per_second=5))
engine = AsyncInferenceEngine(whole)
llm.add_engine(engine, models=["a", "b"])
app.register_blueprint(llm.openai_blueprint(models=["a"], deadline_seconds=600))
app.register_blueprint(llm.ops_blueprint())


@llm.identity_loader
def identity() -> str | None:
    return None


@llm.before_submit
def complete(request: InferenceRequest) -> InferenceRequest:
    request.messages = [Message("system", "Be brief."), *request.messages]
    return request


@llm.permission_check
def check(identity: str | None, request: InferenceRequest) -> None:
    if identity is None:
        raise PermissionDeniedError("Who are you?")


def save(outcome: Outcome) -> None:
    assert_type(outcome.text, str)
    assert_type(outcome.usage, Usage | None)


@request_finished.connect
def finished(sender: Flask, outcome: Outcome) -> None:
    save(outcome)


@app.get("/")
def view() -> Response:
    request = InferenceRequest(prompt="Hi", stop="\n", max_tokens=3)
    assert_type(llm.complete(request), InferenceResponse)
    assert_type(llm.tokens(request), TokenIterator)
    for token in llm.tokens(request):
        assert_type(token, str)
    return llm.stream(request, on_finish=save)


assert_type(engine.submit(InferenceRequest(prompt="Hi")), InferenceHandle)
assert_type(complete(InferenceRequest()), InferenceRequest)
assert_type(echo(InferenceRequest()), Iterator[str | Usage])
batching: CallbackBackend = Batching()  # type: ignore[assignment]  # It returns no function.
llm.stream("Hi")  # type: ignore[arg-type]
llm.backend(echo)  # type: ignore[arg-type]
InferenceRequest("Hi")  # type: ignore[call-arg]
