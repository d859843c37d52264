"""Who asks, what completes a request, who may not ask it, and which engine it goes to."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

from flask import has_request_context

from .call import Admitted
from .core.messages import InferenceRequest
from .exceptions import ConfigurationError, InvalidRequestError, PermissionDeniedError
from .policy import check_features, check_limits, check_request_id, check_types, unknown_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .call import Call
    from .registry import AppEngines, ModelRegistry
    from .typing import Engine

__all__ = ["Admission"]


class Admission:
    """
    What stands before the engines: the app's own functions, and its policy.

    Args:
        registry: Which models there are.

    Attributes:
        identity_loader: See `LLMStream.identity_loader`; None goes by the API key.
        before_submit: See `LLMStream.before_submit`; called in this order.
        permission_checks: See `LLMStream.permission_check`.
    """

    def __init__(self, registry: ModelRegistry) -> None:
        self._registry = registry
        self.identity_loader: Callable[[], Any] | None = None
        self.before_submit: list[Callable[[InferenceRequest], InferenceRequest]] = []
        self.permission_checks: list[Callable[[Any, InferenceRequest], Any]] = []

    def admit(
        self,
        call: Call,
        request: InferenceRequest,
        engines: AppEngines,
        models: Iterable[str] | None,
    ) -> Admitted:
        """See `Service.admit`; *engines* are those of the call's app."""
        check_types(request)
        if request.stream_callback is not None:
            raise InvalidRequestError(
                "stream_callback is the extension's own here. "
                "Submit to an engine to have the items yourself.",
                param="stream_callback",
            )
        request = copy(request)
        engine = self._route(call, request, engines, models)
        request.request_id = request.request_id or call.request_id
        request.identity = self.identity_of(call, request)
        for function in self.before_submit:
            request = _completed(function, request)
        if self.before_submit:
            # The app's own functions may choose any model, also one not offered here.
            engine = self._route(call, request, engines, None)
        check_request_id(request)
        for check in self.permission_checks:
            if check(request.identity, request) is False:
                raise PermissionDeniedError("You may not ask this.")
        return Admitted(request, engine)

    def identify(self, call: Call) -> Any:
        """Who asks in this HTTP request; None outside of one."""
        if self.identity_loader is None:
            return call.key_name
        return self.identity_loader() if has_request_context() else None

    def identity_of(self, call: Call, request: InferenceRequest) -> Any:
        """Who asks, unless a view has said who."""
        return self.identify(call) if request.identity is None else request.identity

    def _route(
        self,
        call: Call,
        request: InferenceRequest,
        engines: AppEngines,
        models: Iterable[str] | None,
    ) -> Engine:
        registry = self._registry
        offered = list(registry.models() if models is None else models)
        if not request.model:
            default = call.settings.default_model
            # Who names no model must not be told of one that this route does not offer.
            is_elsewhere = default not in offered and default in registry.models()
            request.model = next(iter(offered), "") if is_elsewhere or not default else default
        engine = registry.engine_of(request.model, engines) if request.model in offered else None
        if engine is None:
            raise unknown_model(request.model, offered)
        check_limits(request, call.settings)
        check_features(request, engine.backend_for(request.model), request.model)
        return engine


def _completed(
    complete: Callable[[InferenceRequest], InferenceRequest], request: InferenceRequest
) -> InferenceRequest:
    """What a `before_submit` function made of *request*."""
    completed = complete(request)
    if not isinstance(completed, InferenceRequest):
        raise ConfigurationError(
            f"The before_submit function {getattr(complete, '__name__', complete)!r} must return "
            f"the InferenceRequest, not {completed!r}."
        )
    # It may be a new one.
    completed.model = completed.model or request.model
    completed.request_id = completed.request_id or request.request_id
    if completed.identity is None:
        completed.identity = request.identity
    return completed
