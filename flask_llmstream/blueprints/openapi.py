"""
The OpenAPI 3.1 description of an app's routes, made of what serves them.

Paths come from the app's URL map, bodies from the types that they are read as, errors from
the class tree and from each blueprint's own error document. Of answers only the media types
are told: their shapes are the protocols' own.
"""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import msgspec

from .. import exceptions
from .._version import __version__
from ..exceptions import LLMStreamError
from ..framing import JSON, SSE
from .operation import operation_of
from .routes import PackageBlueprint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flask import Flask
    from werkzeug.routing import Rule

    from .operation import Operation
    from .routes import Routes

__all__ = ["describe_api"]

_METHODS = {"DELETE", "GET", "POST"}

_ARGUMENT = re.compile(r"<(?:[^:<>]*:)?([^<>]+)>")
"""An argument in a rule of Werkzeug's: ``<converter:name>``."""

_TEXT = {"type": "string"}

_PARAMETERS = {
    "request_id": {
        "name": "X-Request-ID",
        "in": "header",
        "description": "Comes back in the answer, and stands in the server's log.",
        "schema": _TEXT,
    },
    "request_timeout": {
        "name": "X-Request-Timeout",
        "in": "header",
        "description": "Seconds that the whole answer may take, waiting included.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    },
    "last_event_id": {
        "name": "Last-Event-ID",
        "in": "header",
        "description": "The id of the last event that came: what follows it is sent.",
        "schema": _TEXT,
    },
}

_SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}

_ANY_KEY: list[dict[str, list[str]]] = [{name: []} for name in _SECURITY_SCHEMES]

_LOOKUP_STATUSES = frozenset({400, 401, 404, 413})
"""Of errors on routes where no model is asked."""


def describe_api(app: Flask, *, root: str = "") -> dict[str, Any]:
    """
    Every route of this package's blueprints on *app*, in the order of their paths.

    Args:
        app: The current app.
        root: Where it is mounted (the WSGI ``SCRIPT_NAME``).
    """
    return _Description(app).document(root)


class _Description:
    """One description under construction; components come up as paths name them."""

    def __init__(self, app: Flask) -> None:
        self._app = app
        self._schemas: dict[str, Any] = {}
        self._responses: dict[str, Any] = {}
        self._operation_ids: set[str] = set()

    def document(self, root: str) -> dict[str, Any]:
        paths: dict[str, Any] = {}
        for rule in sorted(self._app.url_map.iter_rules(), key=lambda rule: rule.rule):
            name = rule.endpoint.rpartition(".")[0]
            blueprint = self._app.blueprints.get(name)
            if not isinstance(blueprint, PackageBlueprint):
                continue
            path = paths.setdefault(_ARGUMENT.sub(r"{\1}", rule.rule), {})
            for method in sorted(_METHODS & (rule.methods or set())):
                # Where two have the same, the first is asked.
                if method.lower() not in path:
                    path[method.lower()] = self._operation(rule, name, blueprint.routes)
        return {
            "openapi": "3.1.0",
            "info": {"title": "Language models, streamed", "version": __version__},
            "servers": [{"url": root or "/"}],
            "paths": paths,
            "components": {
                "schemas": self._schemas,
                "responses": self._responses,
                "parameters": _PARAMETERS,
                "securitySchemes": _SECURITY_SCHEMES,
            },
        }

    def _operation(self, rule: Rule, blueprint: str, routes: Routes | None) -> dict[str, Any]:
        view = self._app.view_functions[rule.endpoint]
        said = operation_of(view)
        described: dict[str, Any] = {
            "operationId": self._operation_id(rule.endpoint),
            "tags": [blueprint],
            "summary": (inspect.getdoc(view) or "").partition("\n")[0],
            "parameters": [
                *(
                    _parameter("path", name, _TEXT, required=True)
                    for name in sorted(rule.arguments)
                ),
                *(_parameter("query", name, schema) for name, schema in said.query.items()),
            ],
            "responses": _answers(said),
        }
        if said.body is not None:
            content = {JSON.content_type: {"schema": self._schema(said.body)}}
            described["requestBody"] = {"required": True, "content": content}
        if routes is not None:
            self._describe_access(described, said, blueprint, routes)
        elif 401 in said.answers:
            described["security"] = [{}, *_ANY_KEY]
        return described

    def _describe_access(
        self, described: dict[str, Any], said: Operation, blueprint: str, routes: Routes
    ) -> None:
        """What the routes of models have in common: headers, keys, and how they refuse."""
        settings = routes.settings()
        asks_model = said.body is not None
        parameters = ["request_id"]
        if asks_model:
            parameters.append("request_timeout")
        if asks_model and SSE in said.framings and settings.resume_seconds:
            parameters.append("last_event_id")
            described["responses"]["204"] = {"description": "The stream is at its end already."}
        described["parameters"] += [
            {"$ref": f"#/components/parameters/{name}"} for name in parameters
        ]
        for status, codes in _CODES.items():
            if asks_model or status in _LOOKUP_STATUSES:
                error = self._error(status, codes, blueprint, routes)
                described["responses"][str(status)] = error
        if settings.api_keys is not None:
            described["security"] = _ANY_KEY

    def _operation_id(self, endpoint: str) -> str:
        """*endpoint*, or a variation where it has several paths: each has to be unique."""
        id, number = endpoint, 2
        while id in self._operation_ids:
            id, number = f"{endpoint}_{number}", number + 1
        self._operation_ids.add(id)
        return id

    def _schema(self, body: type) -> dict[str, Any]:
        """A reference to the schema of *body*, under the name of its module and its own."""
        module = body.__module__.rpartition(".")[2]
        place = f"#/components/schemas/{module}."
        (schema,), components = msgspec.json.schema_components(
            [body], ref_template=place + "{name}"
        )
        # Which of the types are private in their module is nobody's business here.
        text = msgspec.json.encode([schema, components]).decode().replace(place + "_", place)
        schema, components = msgspec.json.decode(text)
        for name, component in components.items():
            title = name.removeprefix("_")
            self._schemas[f"{module}.{title}"] = {**component, "title": title}
        reference: dict[str, Any] = schema
        return reference

    def _error(
        self, status: int, codes: list[str], blueprint: str, routes: Routes
    ) -> dict[str, Any]:
        """A reference to the response with *status*, in the form of the blueprint's protocol."""
        name = f"{blueprint}.{status}"
        if name not in self._responses:
            example = msgspec.json.decode(routes.error_document(LLMStreamError("")))
            self._schemas[f"{blueprint}.Error"] = _schema_of(example)
            schema = {"$ref": f"#/components/schemas/{blueprint}.Error"}
            self._responses[name] = {
                "description": ", ".join(codes),
                "headers": _error_headers(status),
                "content": {JSON.content_type: {"schema": schema}},
            }
        return {"$ref": f"#/components/responses/{name}"}


def _codes_by_status() -> dict[int, list[str]]:
    codes: dict[int, list[str]] = {}
    for name in exceptions.__all__:
        cls: type[LLMStreamError] = getattr(exceptions, name)
        if cls.status is not None and cls.code not in codes.setdefault(cls.status, []):
            codes[cls.status].append(cls.code)
    return {status: sorted(codes[status]) for status in sorted(codes)}


_CODES = _codes_by_status()


def _error_headers(status: int) -> dict[str, Any]:
    headers: dict[str, Any] = {"X-Request-ID": {"schema": _TEXT}}
    if status in (429, 503):
        headers["Retry-After"] = {"schema": {"type": "integer", "minimum": 1}}
    return headers


def _answers(said: Operation) -> dict[str, Any]:
    content = {
        framing.content_type: {"schema": {"type": "string" if framing.streams else "object"}}
        for framing in said.framings
    }
    return {
        str(status): {"description": description} | ({} if status == 204 else {"content": content})
        for status, description in said.answers.items()
    }


def _parameter(
    place: str, name: str, schema: Mapping[str, Any], *, required: bool = False
) -> dict[str, Any]:
    return {"name": name, "in": place, "required": required, "schema": schema}


def _schema_of(value: Any) -> dict[str, Any]:
    """The schema of what looks like *value*."""
    if isinstance(value, dict):
        return {
            "type": "object",
            "properties": {name: _schema_of(each) for name, each in value.items()},
            "required": list(value),
        }
    if isinstance(value, bool):
        return {"type": "boolean"}
    return _TEXT if isinstance(value, str) else {}
