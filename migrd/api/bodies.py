"""Bytes of a request to checked models, or everything that is wrong with them at once.

    body bytes --(in time, at most so many)--> model_validate_json --> model
                                                    |
                             violations: field, code, and words with the value found,
                             the unit and the allowed range (from the model's own schema)

Traps: a body is never given to `json.loads` before pydantic's parser has bounded its depth (deep
nesting is a RecursionError there); of two equal keys JSON readers pick different ones, so a
repeated key is refused; NaN is not JSON.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final, NoReturn, TypeVar, cast

from aiohttp import web
from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from migrd.api.problems import Malformed, TooSlow, WrongMediaType
from migrd.api.wire import WireModel
from migrd.errors import TooLarge, Violation

M = TypeVar("M", bound=WireModel)

_CODES: Final[Mapping[str, str]] = {
    "missing": "missing",
    "extra_forbidden": "unknown_field",
    "greater_than": "out_of_range",
    "greater_than_equal": "out_of_range",
    "less_than": "out_of_range",
    "less_than_equal": "out_of_range",
    "string_pattern_mismatch": "bad_format",
    "string_too_long": "too_long",
    "string_too_short": "too_short",
    "too_long": "too_long",
    "enum": "unknown_word",
    "literal_error": "unknown_word",
}
_UNITS: Final = (
    ("_bytes_per_s", "bytes per second"),
    ("_bytes", "bytes"),
    ("_ms", "ms"),
    ("_s", "s"),
    ("_percent", "percent"),
)
MOST_SHOWN: Final = 100
"""So many violations of one part are told; whoever sends more has another problem."""
MOST_FIELDS: Final = 500
"""Fields and items, in all: far more than any request has."""
_SHOWN: Final = 80
"""So much of a wrong value is repeated in a message."""

_EMPTY: Final[dict[type[WireModel], WireModel]] = {}


class Violations(Exception):
    """What is wrong with one part of a request; gathered with those of the other parts."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__(f"{len(violations)} violations")
        self.violations = tuple(violations)


async def read_body(request: web.Request, *, limit_bytes: int, within_s: float) -> bytes:
    """The body. Raises TooLarge, TooSlow, Malformed (the connection broke off, or bad framing)."""
    announced = request.content_length
    if announced is not None and announced > limit_bytes:
        raise _too_large(limit_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(within_s):
            if request.headers.get("Expect"):  # nothing else can refuse it now: let it come
                await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                request.writer.output_size = 0
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > limit_bytes:
                    raise _too_large(limit_bytes)
    except TimeoutError:
        raise TooSlow(f"the body did not arrive within {within_s:g} s") from None
    except (web.RequestPayloadError, ConnectionError, ValueError) as error:
        raise Malformed("the body broke off or is not framed as HTTP/1.1 wants") from error
    return bytes(body)


def _too_large(limit_bytes: int) -> TooLarge:
    return TooLarge(f"the body is longer than {limit_bytes} bytes")


def check_media_type(request: web.Request) -> None:
    """Raises WrongMediaType unless the body says it is plain JSON."""
    if request.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
        raise WrongMediaType("send the body without Content-Encoding")
    kind, charset = request.content_type, (request.charset or "utf-8").lower()
    if "Content-Type" not in request.headers or kind != "application/json":
        said = request.headers.get("Content-Type", "nothing")[:_SHOWN]
        raise WrongMediaType(f"send Content-Type: application/json, not {said!r}")
    if charset not in ("utf-8", "utf8"):
        raise WrongMediaType(f"send JSON as UTF-8, not {charset[:_SHOWN]!r}")


def parse(model: type[M], body: bytes) -> M:
    """The model in a JSON body. Raises Malformed, TooLarge (nesting, fields), Violations."""
    if body.count(b",") >= MOST_FIELDS:  # some may be inside texts
        _refuse_many_fields(body)
    try:
        parsed = model.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False)
        if found[0]["type"] == "json_invalid":
            _refuse_json(found[0])
        raise Violations([_violation(model, item) for item in found[:MOST_SHOWN]]) from None
    _refuse_repeated_keys(body)
    return parsed


def _refuse_many_fields(body: bytes) -> None:
    """Each wrong field costs pydantic microseconds during which nobody else gets a turn."""
    try:
        left: list[Any] = [from_json(body, allow_inf_nan=False)]
    except ValueError:
        return  # the model's own parser says what is wrong
    fields = 0
    while left:
        value = left.pop()
        if not isinstance(value, dict | list):
            continue
        fields += len(value)
        if fields > MOST_FIELDS:
            raise TooLarge(f"the body has more than {MOST_FIELDS} fields", code="too_many_fields")
        left.extend(value.values() if isinstance(value, dict) else value)


def _refuse_json(item: ErrorDetails) -> NoReturn:
    why = str(item.get("ctx", {}).get("error", "not JSON"))
    if "recursion limit" in why:
        raise TooLarge("the body is nested too deeply", code="too_deep")
    raise Malformed(f"the body is not JSON: {why}", code="bad_json")


def _refuse_repeated_keys(body: bytes) -> None:
    """Called only for bodies whose depth pydantic's parser has already bounded."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        as_dict: dict[str, object] = {}
        for key, value in pairs:
            if key in as_dict:
                raise Malformed(f"the key {key[:_SHOWN]!r} is given twice", code="repeated_key")
            as_dict[key] = value
        return as_dict

    json.loads(body, object_pairs_hook=unique)


def parse_strings(model: type[M], given: Sequence[tuple[str, str]], what: str) -> M:
    """The model in query parameters, headers or path segments. Raises Violations."""
    values: dict[str, str] = {}
    repeated: list[Violation] = []
    for name, text in given:
        if name in values:
            repeated.append(Violation(name, "repeated", f"{what} {name} is given more than once"))
        values[name] = text
    try:
        parsed = (
            model.model_validate_strings(values, strict=False) if given else _nothing_given(model)
        )
    except ValidationError as error:
        items = error.errors(include_url=False)[:MOST_SHOWN]
        raise Violations([*repeated, *(_violation(model, item) for item in items)]) from None
    if repeated:
        raise Violations(repeated)
    return parsed


def _nothing_given(model: type[M]) -> M:
    """The same frozen object each time: most requests carry neither parameters nor conditions."""
    if model not in _EMPTY:
        _EMPTY[model] = model.model_validate_strings({}, strict=False)
    return cast("M", _EMPTY[model])


def _violation(model: type[WireModel], item: ErrorDetails) -> Violation:
    field = _field(item["loc"])
    kind = item["type"]
    code = _CODES.get(kind, "wrong_type" if kind.endswith("_type") else "invalid")
    if kind == "missing":
        return Violation(field, code, f"{field} is needed")
    if kind == "extra_forbidden":
        return Violation(field, code, f"{field} is not known here")
    words = item["msg"].removeprefix("Value error, ")
    words = words[:1].lower() + words[1:]
    message = f"{field or 'the request'}: {words}"
    if kind != "value_error" or field:
        message += f"; found {_shown(item['input'])}"
    allowed = _allowed(_schema(model), item["loc"])
    return Violation(field, code, f"{message}; allowed: {allowed}" if allowed else message)


def _field(loc: Sequence[str | int]) -> str:
    path = ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step != "[key]":
            path += f".{step[:_SHOWN]}" if path else step[:_SHOWN]
    return path


def _shown(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=True)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


@cache
def _schema(model: type[WireModel]) -> dict[str, Any]:
    return model.model_json_schema(by_alias=True)


def _allowed(schema: dict[str, Any], loc: Sequence[str | int]) -> str:
    """The range, words or pattern that the model's schema gives at `loc`, with its unit."""
    at = schema
    for step in loc:
        at = _resolve(schema, at)
        at = at.get("properties", {}).get(step, {})
    at = _resolve(schema, at)
    if "enum" in at:
        return ", ".join(str(word) for word in at["enum"])
    if "minimum" in at and "maximum" in at:
        return f"{at['minimum']} to {at['maximum']}{_unit(str(loc[-1]))}"
    if "pattern" in at:
        return f"what matches {at['pattern']}"
    return ""


def _resolve(root: dict[str, Any], at: dict[str, Any]) -> dict[str, Any]:
    """Through $ref and the null of an optional field, to the schema that says something."""
    for choice in at.get("anyOf", ()):
        if choice.get("type") != "null":
            at = choice
            break
    if "$ref" in at:
        target: dict[str, Any] = root["$defs"][at["$ref"].rpartition("/")[2]]
        return target
    return at


def _unit(field: str) -> str:
    return next((f" {unit}" for suffix, unit in _UNITS if field.endswith(suffix)), "")
