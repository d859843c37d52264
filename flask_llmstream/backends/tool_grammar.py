"""Tool calls for models that know none: a prompt, a JSON schema, and a reader of the answer."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.messages import ToolCallDelta
from ..exceptions import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..core.messages import InferenceRequest, Item

__all__ = ["ToolCallReader", "Toolbox", "call_text"]


def call_text(name: str, arguments: str) -> str:
    """A call as the model is asked to write it; *arguments* is JSON text."""
    return f'{{"name": {json.dumps(name)}, "arguments": {arguments or "{}"}}}'


@dataclass(frozen=True, slots=True)
class Toolbox:
    """
    What one request lets the model call.

    Args:
        functions: The ``function`` objects of OpenAI's tool definitions.
        must_call: Whether the answer has to be a call.
    """

    functions: tuple[Mapping[str, Any], ...]
    must_call: bool

    @classmethod
    def of(cls, request: InferenceRequest) -> Toolbox | None:
        """
        The functions that `tool_choice` leaves; None where nothing may be called.

        Raises:
            InvalidRequestError: A name that is not in `tools`, or parameters that are no
                object.
        """
        choice = request.tool_choice
        functions = tuple(tool["function"] for tool in request.tools)
        if not functions or choice == "none":
            return None
        if choice is not None and not isinstance(choice, str):
            name = choice["function"]["name"]
            functions = tuple(each for each in functions if each["name"] == name)
            if not functions:
                raise InvalidRequestError(f"No tool is named {name!r}.", param="tool_choice")
        for position, function in enumerate(functions):
            if (function.get("parameters") or {}).get("type", "object") != "object":
                raise InvalidRequestError(
                    f"The parameters of tool {function['name']!r} must be an object.",
                    param=f"tools[{position}].function.parameters",
                )
        return cls(functions, must_call=choice not in (None, "auto"))

    def instructions(self) -> str:
        """What the system prompt says about the functions."""
        form = '{"name": <function name>, "arguments": <object>}'
        how = (
            f"Answer with the JSON of one call, nothing else: {form}"
            if self.must_call
            else f"To call one, answer with JSON, nothing else: {form}"
        )
        functions = (
            json.dumps(
                {key: each[key] for key in ("name", "description", "parameters") if each.get(key)}
            )
            for each in self.functions
        )
        return "\n".join(("You can call these functions:", *functions, how))

    def schema(self, answer: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """
        The JSON schema that the model's whole output has to follow.

        Args:
            answer: The schema of an answer that is no call; None where it is free text.

        Returns:
            None where free text is allowed, since no schema can say "a call or prose".
        """
        if not self.must_call and answer is None:
            return None
        alternatives = [
            _call_schema(function, f"#/anyOf/{position}")
            for position, function in enumerate(self.functions)
        ]
        if not self.must_call:
            alternatives.append(_relocated(answer, f"#/anyOf/{len(alternatives)}"))
        return {"anyOf": alternatives}

    def reader(self, choice: int) -> ToolCallReader:
        """A fresh reader for one choice's output."""
        return ToolCallReader([each["name"] for each in self.functions], choice=choice)


def _call_schema(function: Mapping[str, Any], pointer: str) -> dict[str, Any]:
    parameters = {"type": "object", **(function.get("parameters") or {})}
    # In this order, since llama.cpp writes properties as listed and the reader relies on it.
    return {
        "type": "object",
        "properties": {
            "name": {"const": function["name"]},
            "arguments": _relocated(parameters, f"{pointer}/properties/arguments"),
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _relocated(schema: Any, pointer: str) -> Any:
    """*schema* with its references into itself led to where it stands now (RFC 6901)."""
    if isinstance(schema, list):
        return [_relocated(each, pointer) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: pointer + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _relocated(value, pointer)
        for key, value in schema.items()
    }


class ToolCallReader:
    """
    Tells a call from prose while the text arrives, and passes on its arguments.

    Text is held back only while it may still become the start of a call of a known
    function; the arguments come through as they are decoded, as raw JSON text. What
    follows a call is dropped: one answer makes one call.

    Args:
        names: The functions that may be called.
        choice: Which of the request's `n` answers this is.

    Attributes:
        has_call: A call has begun.
        is_complete: Its arguments have ended; the model need not go on.
    """

    __slots__ = (
        "_choice",
        "_depth",
        "_held",
        "_in_string",
        "_is_escaped",
        "_is_prose",
        "_names",
        "has_call",
        "is_complete",
    )

    def __init__(self, names: Sequence[str], *, choice: int = 0) -> None:
        self._names = {json.dumps(name): name for name in names}
        self._choice = choice
        self._held: list[str] = []
        self._is_prose = False
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self.has_call = False
        self.is_complete = False

    def feed(self, text: str) -> list[Item]:
        """Take what the model wrote; returns what is certain by now. A `Token` stays one."""
        if self._is_prose:
            return [text]
        if self.is_complete:
            return []
        if self.has_call:
            return self._arguments(text)
        self._held.append(text)
        written = "".join(self._held)
        call = self._match_header(written)
        if call is None:
            return self.finish() if self._is_prose else []
        name, start = call
        self._held.clear()
        self.has_call = True
        delta = ToolCallDelta(0, id=f"call_{secrets.token_hex(12)}", name=name, choice=self._choice)
        return [delta, *self._arguments(written[start:])]

    def finish(self) -> list[Item]:
        """The text has ended: what was held back was no call."""
        held: list[Item] = list(self._held)
        self._held.clear()
        return held

    def _match_header(self, text: str) -> tuple[str, int] | None:
        """The function's name, and where its arguments start; None so far, or for good."""
        name = ""
        position = 0
        steps = (("{",), ('"name"',), (":",), self._names, (",",), ('"arguments"',), (":",), ("{",))
        for step in steps:
            while text[position : position + 1].isspace():
                position += 1
            found = next((each for each in step if text.startswith(each, position)), None)
            if found is None:
                rest = text[position:]
                self._is_prose = not any(each.startswith(rest) for each in step)
                return None
            name = self._names.get(found, name)
            position += len(found)
        return name, position - 1

    def _arguments(self, text: str) -> list[Item]:
        end = self._end_of_arguments(text)
        if end is not None:
            self.is_complete = True
            text = text[:end]
        # A plain string, also of a Token.
        return [ToolCallDelta(0, arguments=str(text), choice=self._choice)] if text else []

    def _end_of_arguments(self, text: str) -> int | None:
        """Where in *text* the object closes that the arguments are; None if further on."""
        for position, character in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return position + 1
        return None
