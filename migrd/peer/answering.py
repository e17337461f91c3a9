"""A request in bytes to the engine's PeerService, and its answer in bytes. Knows no HTTP but its
status codes, so that the tests' in-memory network runs the very same lines.

    protocol version > body understood > caller is the other side of this migration > the call

A caller learns of a migration that is not its own only that it is none of its business.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import structlog
from pydantic import ValidationError

from migrd.engine.peer_service import PEER_PROTOCOL, PeerService
from migrd.errors import (
    Conflict,
    Invalid,
    JournalError,
    MigrdError,
    NotAuthorized,
    NotFound,
    TooLarge,
    Unavailable,
    VmmDied,
    VmmRefused,
)
from migrd.peer.messages import (
    CALLS,
    MAX_WAIT_S,
    DiscardRequest,
    GrantRequest,
    MigrationRequest,
    PreflightRequest,
    PrepareRequest,
    Problem,
    ViewRequest,
    WireAddress,
    WireDestinationView,
    WireHello,
    WireHostProfile,
    WireSourceView,
)
from migrd.peer.wire import WireModel, shortened

_STATUS: Final[tuple[tuple[type[MigrdError], int, str], ...]] = (
    (Invalid, 422, "Invalid"),
    (NotFound, 404, "Not found"),
    (NotAuthorized, 403, "Not authorized"),
    (TooLarge, 413, "Too large"),
    (Conflict, 409, "Conflict"),
    (VmmDied, 409, "QEMU ended"),
    (VmmRefused, 409, "QEMU refused"),
    (Unavailable, 503, "Unavailable"),
    (JournalError, 503, "The journal failed"),
    (MigrdError, 504, "No answer"),  # VmmTimedOut and the like: the outcome is not known here
)

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Reply:
    """What goes back to the caller; `protocol` travels in a header."""

    status: int
    body: bytes
    protocol: str | None = str(PEER_PROTOCOL)


async def answer(
    service: PeerService, caller: str, call: str, protocol: str | None, body: bytes
) -> Reply:
    """Answer one call of `caller` (authenticated). Raises nothing but CancelledError."""
    try:
        _check_protocol(protocol)
        if call not in CALLS:
            raise NotFound(f"no call {call[:64]!r} between daemons", code="unknown_call")
        request = _read(CALLS[call].request, body)
        _check_party(service, caller, call, request)
        found = await _SERVE[call](service, caller, request)
        return Reply(200, found.model_dump_json().encode())
    except MigrdError as error:
        return problem_reply(error)
    except Exception:
        log.exception("peer.call_failed", caller=caller, call=call)
        return problem(500, "Internal error", "a defect; the log of that host says more", "defect")


def problem_reply(error: MigrdError) -> Reply:
    status, title = next((s, t) for kind, s, t in _STATUS if isinstance(error, kind))
    return problem(status, title, error.message, error.code, retryable=error.retryable)


def problem(status: int, title: str, detail: str, code: str, *, retryable: bool = False) -> Reply:
    said = Problem(
        title=title,
        status=status,
        detail=shortened(detail) or "",
        code=code,
        retryable=retryable,
    )
    return Reply(status, said.model_dump_json().encode())


def _check_protocol(protocol: str | None) -> None:
    if protocol != str(PEER_PROTOCOL):
        spoken = "none" if protocol is None else repr(protocol[:20])
        raise Conflict(
            f"this host speaks version {PEER_PROTOCOL} of the protocol between daemons, the caller"
            f" {spoken}: bring both to the same version of migrd",
            code="protocol_mismatch",
        )


def _read(model: type[WireModel], body: bytes) -> Any:
    try:
        return model.model_validate_json(body)
    except ValidationError as failure:
        first = failure.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "body"
        raise Invalid(f"{place}: {first['msg']}", code="bad_message") from None


def _check_party(service: PeerService, caller: str, call: str, request: WireModel) -> None:
    migration_id = getattr(request, "migration_id", None)
    if migration_id is None:
        return
    if call == "source_view":
        party = service.outgoing_destination(migration_id)
    else:
        party = service.incoming_source(migration_id)
    if party is not None and party != caller:
        log.warning("peer.foreign_migration", caller=caller, call=call, migration_id=migration_id)
        raise NotAuthorized(
            f"migration {migration_id} is not between this host and {caller}",
            code="not_your_migration",
        )


async def _hello(service: PeerService, caller: str, _: WireModel) -> WireModel:
    return WireHello.of(service.hello())


async def _preflight(service: PeerService, caller: str, ask: PreflightRequest) -> WireModel:
    return WireHostProfile.of(await service.preflight(caller, ask.vm.value()))


async def _prepare(service: PeerService, caller: str, ask: PrepareRequest) -> WireModel:
    view = await service.prepare(
        *(caller, ask.migration_id, ask.epoch, ask.vm.value(), ask.settings.value()),
        least=ask.least,
    )
    return WireDestinationView.of(view)


async def _view(service: PeerService, caller: str, ask: ViewRequest) -> WireModel:
    view = await service.view(
        caller,
        ask.migration_id,
        newer_than=ask.newer_than,
        wait_s=min(ask.wait_s, MAX_WAIT_S),
    )
    return WireDestinationView.of(view)


async def _grant(service: PeerService, caller: str, ask: GrantRequest) -> WireModel:
    view = await service.grant(caller, ask.migration_id, ask.epoch, run_guest=ask.run_guest)
    return WireDestinationView.of(view)


async def _discard(service: PeerService, caller: str, ask: DiscardRequest) -> WireModel:
    view = await service.discard(caller, ask.migration_id, ask.epoch, ask.reason)
    return WireDestinationView.of(view)


async def _listen(service: PeerService, caller: str, ask: MigrationRequest) -> WireModel:
    return WireAddress.of(await service.listen_for_recovery(caller, ask.migration_id))


async def _source_view(service: PeerService, caller: str, ask: MigrationRequest) -> WireModel:
    return WireSourceView.of(await service.source_view(caller, ask.migration_id))


_SERVE: Final[Mapping[str, Callable[[PeerService, str, Any], Awaitable[WireModel]]]] = {
    "hello": _hello,
    "preflight": _preflight,
    "prepare": _prepare,
    "view": _view,
    "grant": _grant,
    "discard": _discard,
    "listen_for_recovery": _listen,
    "source_view": _source_view,
}
