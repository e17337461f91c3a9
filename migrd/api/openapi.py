"""The OpenAPI 3.1 document, generated from the route table and the models that check requests.

    python -m migrd.api.openapi > migrd/api/openapi.json     writes what is committed; a test fails
                                                             when the two differ

Nothing is written by hand here but what HTTP itself means: what a status says, what a header is.
Trap: pydantic's schema of a model differs between what is accepted and what is sent (defaults), so
requests are asked for in "validation" mode and answers in "serialization" mode.
"""

import inspect
import json
import sys
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final, Literal

from pydantic.json_schema import models_json_schema

import migrd
from migrd.api.app import DECLARED_IN
from migrd.api.auth import Scope
from migrd.api.models_host import Event
from migrd.api.problems import PROBLEM_TYPE, Problem
from migrd.api.table import JSON_TYPE, ROUTES, Answer, Route
from migrd.api.wire import WireModel

Schema = dict[str, Any]
Mode = Literal["validation", "serialization"]

_EVERYWHERE: Final = (400, 500, 503)
"""Problems that any route may answer; each also 401 and 403 unless it is open to all."""
_WITH_BODY: Final = (408, 413, 415)
_TITLE: Final = "migrd"
_TAGS: Final[Mapping[str, str]] = {
    "host": "This host.",
    "devices": "What this host can pass through to VMs.",
    "vms": "The VMs of this host.",
    "migrations": "Moving guests: the migration is the operation.",
    "events": "What happens, as it happens.",
    "service": "Health, metrics, this document.",
}
_HEADERS: Final[Mapping[str, Schema]] = {
    "ETag": {"description": "Names this state.", "schema": {"type": "string"}},
    "Location": {"description": "Where it is.", "schema": {"type": "string"}},
    "Retry-After": {
        "description": "Seconds after which to look again.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "Allow": {"description": "What is possible here.", "schema": {"type": "string"}},
    "WWW-Authenticate": {"description": "How to say who asks.", "schema": {"type": "string"}},
}


def document() -> Schema:
    """The whole document."""
    assert DECLARED_IN
    refs, schemas = _schemas()
    paths: dict[str, Schema] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, refs)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": _TITLE,
            "version": migrd.__version__,
            "summary": "Live migration of virtual machines: one daemon per hypervisor host.",
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/", "description": "The unix socket, or the TCP listener."}],
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": _SECURITY},
    }


_DESCRIPTION: Final = (
    "Errors are problem details (RFC 9457) whose `code` is stable; `violations` lists everything "
    "that is wrong with a request at once. A quantity carries its unit in its name. null means "
    "not known, or not yet. A host is named, never addressed: clients supply no URI, path or port."
)
_SECURITY: Final[Schema] = {
    "token": {
        "type": "http",
        "scheme": "bearer",
        "description": "On TCP; a token may read, or also write. On the unix socket nothing is "
        "sent: the kernel says who asks (SO_PEERCRED).",
    },
}


def _schemas() -> tuple[Mapping[Any, Schema], dict[str, Schema]]:
    """(model and mode -> its reference, every schema by name)."""
    wanted: dict[tuple[type[WireModel], Mode], None] = {
        (Problem, "serialization"): None,
        (Event, "serialization"): None,
    }
    for route in ROUTES:
        if route.body_model is not None:
            wanted[(route.body_model, "validation")] = None
        for answer in route.answers.values():
            if answer.model is not None:
                wanted[(answer.model, "serialization")] = None
    refs, definitions = models_json_schema(
        list(wanted), ref_template="#/components/schemas/{model}"
    )
    by_name: dict[str, Schema] = definitions["$defs"]
    return refs, {name: by_name[name] for name in sorted(by_name)}


def _operation(route: Route, refs: Mapping[Any, Schema]) -> Schema:
    summary, _, description = (inspect.getdoc(route.function) or "").partition("\n\n")
    operation: Schema = {
        "operationId": route.name,
        "tags": [route.tag.value],
        "summary": " ".join(summary.split()),
    }
    if description:
        operation["description"] = " ".join(description.split())
    if parameters := _parameters(route):
        operation["parameters"] = parameters
    if route.body_model is not None:
        schema = refs[(route.body_model, "validation")]
        operation["requestBody"] = {"required": True, "content": {JSON_TYPE: {"schema": schema}}}
    operation["responses"] = _responses(route, refs)
    operation["security"] = (
        [] if route.scope is Scope.OPEN else [{"token": [route.scope.value]}, {}]
    )
    return operation


def _parameters(route: Route) -> list[Schema]:
    found: list[Schema] = []
    for model, where in (
        (route.path_model, "path"),
        (route.query_model, "query"),
        (route.headers_model, "header"),
    ):
        if model is not None:
            found += _parameters_of(model, where)
    return found


def _parameters_of(model: type[WireModel], where: str) -> list[Schema]:
    whole = model.model_json_schema(by_alias=True)
    required = set(whole.get("required", ()))
    found = []
    for name, schema in whole.get("properties", {}).items():
        schema = _plain(schema, whole.get("$defs", {}))
        parameter: Schema = {"name": name, "in": where}
        if description := schema.pop("description", None):
            parameter["description"] = description
        if name in required:
            parameter["required"] = True
        found.append({**parameter, "schema": schema})
    return found


def _plain(schema: Schema, defs: Mapping[str, Schema]) -> Schema:
    """A parameter is text or absent: no null of an optional field, no references, no titles."""
    plain = {key: value for key, value in schema.items() if key not in ("title", "anyOf", "$ref")}
    for choice in schema.get("anyOf", ()):
        if choice.get("type") != "null":
            plain = {**_plain(choice, defs), **plain}
    if "$ref" in schema:
        target = _plain(defs[schema["$ref"].rpartition("/")[2]], defs)
        target.pop("description", None)
        plain = {**target, **plain}
    if plain.get("default", ...) is None:
        del plain["default"]
    return plain


def _responses(route: Route, refs: Mapping[Any, Schema]) -> Schema:
    responses: Schema = {
        str(status): _good(answer, refs) for status, answer in sorted(route.answers.items())
    }
    for status in sorted(_problems(route)):
        responses[str(status)] = _problem(status, refs)
    return responses


def _problems(route: Route) -> set[int]:
    statuses = {*_EVERYWHERE, *route.problems, 422, 504}
    if route.scope is not Scope.OPEN:
        statuses |= {401, 403}
    if route.body_model is not None:
        statuses |= set(_WITH_BODY)
    return statuses


def _good(answer: Answer, refs: Mapping[Any, Schema]) -> Schema:
    good: Schema = {"description": answer.meaning}
    if answer.headers:
        good["headers"] = {name: _HEADERS[name] for name in answer.headers}
    if answer.model is not None:
        schema = refs[(answer.model, "serialization")]
        good["content"] = {answer.content_type: {"schema": schema}}
    elif answer.content_type != JSON_TYPE:
        good["content"] = {answer.content_type: {"schema": {"type": "string"}}}
    return good


def _problem(status: int, refs: Mapping[Any, Schema]) -> Schema:
    problem: Schema = {
        "description": HTTPStatus(status).phrase,
        "content": {PROBLEM_TYPE: {"schema": refs[(Problem, "serialization")]}},
    }
    if status == 401:
        problem["headers"] = {"WWW-Authenticate": _HEADERS["WWW-Authenticate"]}
    if status == 503:
        problem["headers"] = {"Retry-After": _HEADERS["Retry-After"]}
    return problem


def render() -> bytes:
    """The document as it is committed and served."""
    return json.dumps(document(), indent=1, ensure_ascii=False).encode() + b"\n"


if __name__ == "__main__":
    sys.stdout.buffer.write(render())
