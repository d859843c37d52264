"""
Stream language-model tokens from a Flask app.

    llm = LLMStream(app)

    @llm.backend("echo")
    def echo(request):
        yield from request.last_user_text.split()

    app.register_blueprint(llm.openai_blueprint())
"""

from ._version import __version__
from .backends.echo import EchoBackend
from .backends.llama_cpp import LlamaCppBackend
from .backends.upstream import UpstreamBackend
from .call import request_finished
from .client import StreamReader
from .core.deadlines import Deadline
from .core.messages import (
    Choice,
    Finish,
    InferenceRequest,
    InferenceResponse,
    Message,
    Reasoning,
    Refusal,
    Token,
    ToolCall,
    ToolCallDelta,
    TopLogprob,
    Usage,
)
from .engines.admission import BackpressurePolicy
from .engines.asynchronous import AsyncInferenceEngine
from .engines.enhanced import InferenceEngineEnhanced
from .engines.handle import InferenceHandle
from .engines.rotation import LoadBalanceStrategy
from .exceptions import (
    AccessError,
    AdmissionError,
    AuthenticationError,
    ConfigurationError,
    DeadlineExceededError,
    EngineClosedError,
    EngineError,
    FirstTokenTimeoutError,
    IdleTimeoutError,
    IncompleteStreamError,
    InvalidRequestError,
    LLMStreamError,
    NotAcceptableError,
    PermissionDeniedError,
    QueueFullError,
    RequestCancelledError,
    RequestDroppedError,
    RequestError,
    RequestTooLargeError,
    ServerShutdownError,
    SlowReaderError,
    StreamError,
    TooManyRequestsError,
    UnknownModelError,
    UnknownStreamError,
    UpstreamError,
)
from .extension import LLMStream
from .handler import StreamingHandler
from .outcome import Outcome
from .reconnecting import Backoff
from .stores import MemoryStore
from .typing import (
    FEATURES,
    Backend,
    BatchBackend,
    CallbackBackend,
    Dialect,
    Emit,
    Engine,
    Store,
    TokenCallback,
)

__all__ = [
    "FEATURES",
    "AccessError",
    "AdmissionError",
    "AsyncInferenceEngine",
    "AuthenticationError",
    "Backend",
    "Backoff",
    "BackpressurePolicy",
    "BatchBackend",
    "CallbackBackend",
    "Choice",
    "ConfigurationError",
    "Deadline",
    "DeadlineExceededError",
    "Dialect",
    "EchoBackend",
    "Emit",
    "Engine",
    "EngineClosedError",
    "EngineError",
    "Finish",
    "FirstTokenTimeoutError",
    "IdleTimeoutError",
    "IncompleteStreamError",
    "InferenceEngineEnhanced",
    "InferenceHandle",
    "InferenceRequest",
    "InferenceResponse",
    "InvalidRequestError",
    "LLMStream",
    "LLMStreamError",
    "LlamaCppBackend",
    "LoadBalanceStrategy",
    "MemoryStore",
    "Message",
    "NotAcceptableError",
    "Outcome",
    "PermissionDeniedError",
    "QueueFullError",
    "Reasoning",
    "Refusal",
    "RequestCancelledError",
    "RequestDroppedError",
    "RequestError",
    "RequestTooLargeError",
    "ServerShutdownError",
    "SlowReaderError",
    "Store",
    "StreamError",
    "StreamReader",
    "StreamingHandler",
    "Token",
    "TokenCallback",
    "TooManyRequestsError",
    "ToolCall",
    "ToolCallDelta",
    "TopLogprob",
    "UnknownModelError",
    "UnknownStreamError",
    "UpstreamBackend",
    "UpstreamError",
    "Usage",
    "__version__",
    "request_finished",
]
