"""
JSON schemas that llama.cpp must not see.

It turns a schema into a grammar without a bound on what that takes, in native code that
nothing can stop: of what is refused here each kind has ended the process, or kept the model
from ever answering again.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ..exceptions import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeGuard

__all__ = ["check_schema"]

# Of references to references. Longer chains are followed on the stack, and by us.
_LONGEST_CHAIN = 32

_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")

# A bound with more digits has it count without end.
_MOST_DIGITS = 15

# Of a regular expression; also where it is escaped, which takes more than this to tell.
_REPETITION = re.compile(r"\{([0-9]+),([0-9]+)\}")


def check_schema(schema: Any) -> None:
    """
    Refuse *schema* where llama.cpp would not come back from it.

    Raises:
        InvalidRequestError: Says what to change.
    """
    for part in _parts(schema):
        if isinstance(part, dict):
            _check_reference(part, schema)
            _check_bounds(part)
            for least, most in (("minLength", "maxLength"), ("minItems", "maxItems")):
                if _is_number(part.get(least)) and _is_number(part.get(most)):
                    _check_order(least, part[least], most, part[most])
            if isinstance(part.get("pattern"), str):
                _check_pattern(part["pattern"])
        elif isinstance(part, int) and not -(2**63) <= part < 2**64:
            raise _refusal("a number has more than 64 bits")


def _parts(schema: Any) -> Iterator[Any]:
    """*schema* and everything in it. Not recursive: a view's own may be of any depth."""
    found = [schema]
    while found:
        part = found.pop()
        yield part
        if isinstance(part, dict):
            found += part.values()
        elif isinstance(part, (list, tuple)):
            found += part


def _check_reference(part: dict[str, Any], schema: Any) -> None:
    """It follows a reference to a reference, and so on, for as long as they last."""
    first = reference = part.get("$ref")
    for _ in range(_LONGEST_CHAIN):
        if not isinstance(reference, str):
            return
        target = _resolved(reference, schema)
        reference = target.get("$ref") if isinstance(target, dict) else None
    raise _refusal(f"the reference {str(first)[:100]!r} leads to nothing but references")


def _resolved(reference: str, schema: Any) -> Any:
    """What *reference* points to; None where that is nothing, which llama.cpp says itself."""
    part = schema
    for name in reference.split("/")[1:]:
        if isinstance(part, dict):
            part = part.get(name)
        elif isinstance(part, (list, tuple)) and name.isascii() and name.isdigit():
            place = int(name[:9])
            part = part[place] if place < len(part) else None
        else:
            return None
    return part


def _check_bounds(part: dict[str, Any]) -> None:
    for name in _BOUNDS:
        bound = part.get(name)
        if _is_number(bound) and abs(bound) >= 10**_MOST_DIGITS:
            raise _refusal(f"{name} has more than {_MOST_DIGITS} digits")


def _check_order(least_name: str, least: float, most_name: str, most: float) -> None:
    if least > most:
        raise _refusal(f"{least_name} is greater than {most_name}")


def _check_pattern(pattern: str) -> None:
    for least, most in _REPETITION.findall(pattern):
        if max(len(least), len(most)) > _MOST_DIGITS or int(least) > int(most):
            raise _refusal(f"{{{least[:20]},{most[:20]}}} in a pattern is no range")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _refusal(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"The JSON schema cannot be used: {reason}.")
