"""`engine.ports.Peer` over any exchange of bytes: what an answer, or the lack of one, means.

    nothing left this host                                  PeerUnreachable   not delivered
    it left, and: no answer, cut off, garbage, too long,
      a defect there (5xx but 503), an unknown phase        PeerTimedOut      NOT known
    a problem                                               PeerRefused       with its code
    the answer that the call has                            the value

A PeerRefused to `grant` is not the destination's refusal: only a view in phase `refused` is.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Final, TypeVar

from pydantic import ValidationError

from migrd.core.facts import TransferAddress, TransferSettings, VmSpec
from migrd.core.tracking import Migratability
from migrd.engine.peer_service import PEER_PROTOCOL, HelloFacts
from migrd.engine.ports import DestinationView, HostProfile, SourceView
from migrd.errors import PeerRefused, PeerTimedOut
from migrd.peer.answering import Reply
from migrd.peer.messages import (
    CALLS,
    MAX_WAIT_S,
    DiscardRequest,
    Empty,
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
    WireSettings,
    WireSourceView,
    WireVmSpec,
)
from migrd.peer.wire import WireModel, shortened

M = TypeVar("M", bound=WireModel)

QUICK_S: Final = 5.0
"""Deadline of a call that only looks or writes a record there."""
PREFLIGHT_S: Final = 20.0
"""A QEMU may be asked for its version."""
PREPARE_S: Final = 60.0
"""A QEMU is launched."""
GRANT_S: Final = 15.0
"""A guest is started; the destination answers earlier than that with how far it is."""
_UNKNOWN_OUTCOME: Final = frozenset(range(500, 600)) - {503}


class WirePeer(ABC):
    """All of Peer but the exchange itself."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    @abstractmethod
    async def _exchange(self, call: str, body: bytes, *, within_s: float) -> Reply:
        """Send and receive. Raises PeerUnreachable when nothing was sent, else PeerTimedOut."""

    async def hello(self) -> HelloFacts:
        """Who answers there; the cheapest call."""
        found = await self._ask("hello", Empty(), WireHello, QUICK_S)
        if found.host.lower() != self.name.lower():
            raise PeerRefused(
                f"{self.name}: the host that answers calls itself {found.host}: correct the roster",
                code="wrong_host",
            )
        return found.value()

    async def preflight(self, vm: VmSpec) -> HostProfile:
        with _sendable(self.name):
            request = PreflightRequest(vm=WireVmSpec.of(vm))
        return (await self._ask("preflight", request, WireHostProfile, PREFLIGHT_S)).value()

    async def prepare(
        self,
        migration_id: str,
        epoch: int,
        vm: VmSpec,
        settings: TransferSettings,
        *,
        least: Migratability | None = None,
    ) -> DestinationView:
        with _sendable(self.name):
            request = PrepareRequest(
                migration_id=migration_id,
                epoch=epoch,
                vm=WireVmSpec.of(vm),
                settings=WireSettings.of(settings),
                least=least,
            )
        return await self._ask_view("prepare", request, migration_id, PREPARE_S)

    async def view(
        self, migration_id: str, *, newer_than: int = -1, wait_s: float = 0.0
    ) -> DestinationView:
        wait_s = min(wait_s, MAX_WAIT_S)
        with _sendable(self.name):
            request = ViewRequest(migration_id=migration_id, newer_than=newer_than, wait_s=wait_s)
        return await self._ask_view("view", request, migration_id, wait_s + QUICK_S)

    async def grant(self, migration_id: str, epoch: int, *, run_guest: bool) -> DestinationView:
        with _sendable(self.name):
            request = GrantRequest(migration_id=migration_id, epoch=epoch, run_guest=run_guest)
        return await self._ask_view("grant", request, migration_id, GRANT_S)

    async def discard(self, migration_id: str, epoch: int, reason: str) -> DestinationView:
        with _sendable(self.name):
            request = DiscardRequest(
                migration_id=migration_id, epoch=epoch, reason=shortened(reason) or ""
            )
        return await self._ask_view("discard", request, migration_id, GRANT_S)

    async def listen_for_recovery(self, migration_id: str) -> TransferAddress:
        with _sendable(self.name):
            request = MigrationRequest(migration_id=migration_id)
        return (await self._ask("listen_for_recovery", request, WireAddress, GRANT_S)).value()

    async def source_view(self, migration_id: str) -> SourceView:
        with _sendable(self.name):
            request = MigrationRequest(migration_id=migration_id)
        found = await self._ask("source_view", request, WireSourceView, QUICK_S)
        if found.migration_id != migration_id:
            raise self._unintelligible("source_view", "it speaks of another migration")
        return found.value()

    async def _ask_view(
        self, call: str, request: WireModel, migration_id: str, within_s: float
    ) -> DestinationView:
        found = await self._ask(call, request, WireDestinationView, within_s)
        if found.migration_id != migration_id:
            raise self._unintelligible(call, "it speaks of another migration")
        return found.value()

    async def _ask(self, call: str, request: WireModel, answer: type[M], within_s: float) -> M:
        assert isinstance(request, CALLS[call].request)
        assert answer is CALLS[call].answer
        body = request.model_dump_json().encode()
        return self._understand(call, answer, await self._exchange(call, body, within_s=within_s))

    def _understand(self, call: str, answer: type[M], reply: Reply) -> M:
        self._check_protocol(call, reply)
        if reply.status == 200:
            try:
                return answer.model_validate_json(reply.body)
            except ValidationError as failure:
                raise self._unintelligible(call, _first_of(failure)) from None
        try:
            problem = Problem.model_validate_json(reply.body)
        except ValidationError:
            raise self._unintelligible(call, f"status {reply.status} without a reason") from None
        said = f"{self.name}: {call}: {problem.detail}"
        if reply.status in _UNKNOWN_OUTCOME:
            raise PeerTimedOut(f"{said} (not known how far it came)", code=problem.code)
        refused = PeerRefused(said, code=problem.code)
        refused.retryable = problem.retryable
        raise refused

    def _check_protocol(self, call: str, reply: Reply) -> None:
        if reply.protocol == str(PEER_PROTOCOL):
            return
        if reply.protocol is None:
            raise self._unintelligible(call, "what answers there is no migrd")
        said = (
            f"{self.name} speaks version {reply.protocol[:20]} of the protocol between daemons,"
            f" this host {PEER_PROTOCOL}: bring both to the same version of migrd"
        )
        if reply.status == 200:  # it should have refused; who knows what it took the message for
            raise PeerTimedOut(said, code="protocol_mismatch")
        raise PeerRefused(said, code="protocol_mismatch")

    def _unintelligible(self, call: str, why: str) -> PeerTimedOut:
        return PeerTimedOut(
            f"{self.name}: the answer to {call} is not understood: {why}",
            code="peer_unintelligible",
        )


@contextlib.contextmanager
def _sendable(peer: str) -> Iterator[None]:
    """What a message cannot say was not sent."""
    try:
        yield
    except ValidationError as failure:
        raise PeerRefused(
            f"{peer}: not sent: {_first_of(failure)}", code="bad_message"
        ) from failure


def _first_of(failure: ValidationError) -> str:
    first = failure.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "body"
    return f"{place}: {first['msg']}"
