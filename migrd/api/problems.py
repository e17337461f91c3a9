"""Errors on the wire: problem details (RFC 9457), one status for each class, exhaustively.

The tree of `migrd.errors`, and the leaves that only HTTP knows:

    RequestError
    ├── Malformed             the bytes are not what they say they are (JSON, a header)     400
    ├── TooSlow               the body did not arrive in time                               408
    ├── WrongMediaType        a body that is not application/json                           415
    ├── MethodNotAllowed      the path exists, the method does not; carries `allow`         405
    ├── Unexpected            an Expect header other than 100-continue                      417
    ├── NotFound > NoSuchRoute            the path does not exist                           404
    ├── Conflict > PreconditionFailed     If-Match names another generation                 412
    └── NotAuthorized > NotAuthenticated  nobody knows who asks                             401
    Unavailable
    ├── TimedOut              the daemon itself did not end in time: it may have happened   504
    ├── NotReady              some check of readiness fails; each is a violation            503
    ├── TooManyStreams        as many event streams as there may be                         503
    └── TooManyConnections    as many connections as there may be                           503

`status_of` asks the class, then its bases: a new error class has a status on the day it is written,
and a test walks the tree so that each inherits on purpose. An exception that is none of ours is a
500 that says nothing but the id under which the log has it.
"""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Final

from pydantic import ConfigDict, Field

from migrd import errors
from migrd.api.wire import WireModel

PROBLEM_TYPE: Final = "application/problem+json"
RETRY_AFTER_S: Final = 2


class Malformed(errors.RequestError):
    code = "malformed"


class TooSlow(errors.RequestError):
    code = "too_slow"
    retryable = True


class WrongMediaType(errors.RequestError):
    code = "wrong_media_type"


class MethodNotAllowed(errors.RequestError):
    code = "method_not_allowed"

    def __init__(self, message: str, allow: Sequence[str]) -> None:
        super().__init__(message)
        self.allow = tuple(sorted(allow))


class Unexpected(errors.RequestError):
    code = "unexpected_expectation"


class NoSuchRoute(errors.NotFound):
    code = "no_such_route"


class PreconditionFailed(errors.Conflict):
    code = "precondition_failed"


class NotAuthenticated(errors.NotAuthorized):
    code = "not_authenticated"


class TimedOut(errors.Unavailable):
    """It may or may not have taken effect."""

    code = "timed_out"


class NotReady(errors.Unavailable):
    code = "not_ready"

    def __init__(self, violations: Sequence[errors.Violation]) -> None:
        super().__init__("; ".join(f"{v.field}: {v.message}" for v in violations))
        self.violations = tuple(violations)


class TooManyStreams(errors.Unavailable):
    code = "too_many_streams"


class TooManyConnections(errors.Unavailable):
    code = "too_many_connections"


STATUS: Final[Mapping[type[BaseException], int]] = {
    errors.MigrdError: 500,
    errors.ConfigError: 500,
    errors.RequestError: 400,
    errors.Invalid: 422,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.Refused: 409,
    errors.NotAuthorized: 403,
    errors.TooLarge: 413,
    errors.Unavailable: 503,
    errors.VmmError: 502,
    errors.VmmRefused: 502,
    errors.VmmTimedOut: 504,
    errors.VmmUnreachable: 503,
    errors.VmmDied: 502,
    errors.PeerError: 502,
    errors.PeerRefused: 502,
    errors.PeerTimedOut: 504,
    errors.PeerUnreachable: 503,
    errors.StreamError: 502,
    errors.ReceiveError: 502,
    errors.KernelError: 500,
    errors.KernelTooOld: 501,
    errors.KernelUnsupported: 409,
    errors.KernelDenied: 500,
    errors.KernelGone: 409,
    errors.KernelBusy: 409,
    errors.KernelRejected: 500,
    errors.LogLost: 500,
    errors.DeviceError: 500,
    errors.DeviceTimedOut: 504,
    errors.DeviceNeedsReset: 409,
    errors.DeviceRefused: 409,
    errors.ArbiterError: 503,
    errors.ArbiterUnavailable: 503,
    errors.ArbiterConflict: 409,
    errors.JournalError: 503,
    Malformed: 400,
    TooSlow: 408,
    WrongMediaType: 415,
    MethodNotAllowed: 405,
    Unexpected: 417,
    NoSuchRoute: 404,
    PreconditionFailed: 412,
    NotAuthenticated: 401,
    TimedOut: 504,
    NotReady: 503,
    TooManyStreams: 503,
    TooManyConnections: 503,
}


class Violation(WireModel):
    """One thing that is wrong with a request."""

    field: str
    """Path of the field (`policy.downtime_limit_ms`); of a parameter or header, its name."""
    code: str
    message: str


class Problem(WireModel):
    """Problem details (RFC 9457) of an answer that is not what was asked for."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:migrd:problem:already_migrating",
                    "title": "Conflict",
                    "status": 409,
                    "detail": "web-1 is being migrated already",
                    "instance": "/v1/migrations",
                    "code": "already_migrating",
                    "retryable": False,
                    "violations": [],
                    "request_id": "b1946ac92492d234",
                }
            ]
        }
    )

    type: str
    """`urn:migrd:problem:` and the code."""
    title: str
    status: Annotated[int, Field(ge=400, le=599)]
    detail: str
    """For people: what is wrong, with the values found, and what would be right."""
    instance: str
    """The path that was asked."""
    code: str
    """Stable, for programs."""
    retryable: bool
    """The same request may work later."""
    violations: tuple[Violation, ...]
    """Everything that is wrong with the request, at once."""
    request_id: str
    """The log of the daemon has it, too."""


def status_of(kind: type[BaseException]) -> int:
    """The status for an error class: its own, or that of its nearest base; 500 for a stranger."""
    for base in kind.__mro__:
        if base in STATUS:
            return STATUS[base]
    return 500


def problem_of(error: BaseException, *, instance: str, request_id: str) -> Problem:
    """What a client is told. Of an exception that is none of ours, only that it happened."""
    status = status_of(type(error))
    if isinstance(error, errors.MigrdError):
        detail, code, retryable = error.message, error.code, error.retryable
    else:
        detail = f"an error inside migrd; its log has it under request_id {request_id}"
        code, retryable = "internal_error", False
    return Problem(
        type=f"urn:migrd:problem:{code}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        instance=instance,
        code=code,
        retryable=retryable,
        violations=tuple(
            Violation(field=v.field, code=v.code, message=v.message)
            for v in getattr(error, "violations", ())
        ),
        request_id=request_id,
    )


def headers_of(error: BaseException) -> dict[str, str]:
    """The headers that HTTP wants with an error."""
    headers = {"Cache-Control": "no-store"}
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = ", ".join(error.allow)
    elif isinstance(error, NotAuthenticated):
        headers["WWW-Authenticate"] = 'Bearer realm="migrd"'
    elif status_of(type(error)) == 503:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    return headers


def ends_connection(error: BaseException) -> bool:
    """After these, the rest of the request is still on its way and nobody will read it."""
    return isinstance(error, TooSlow | errors.TooLarge)
