"""What this host does for other hosts' migrd: the answering side of `ports.Peer`.

    engine --Peer--> peer.client ~~~ mutual TLS ~~~> peer.server --PeerService--> engine there

Rules
1. `source` (and `destination`, in `source_view`) is the name in the caller's certificate, found in
   the roster: authenticated, never taken from a message.
2. A caller may only touch migrations it is the other side of. The server asks `incoming_source` and
   `outgoing_destination` before it calls anything else, so a call here has been checked already.
3. Messages are lost, late, repeated and reordered: each call is idempotent by migration id and
   epoch. A message of an older epoch changes nothing and raises Conflict(code="stale_epoch").
4. A caller that is cut off does not cancel the call: the server lets it end (its effect may be half
   done), and the caller asks again. Only the waiting in `view` is cancelled.
5. Whether the destination refused the guest is said by a DestinationView in phase `refused`, and by
   nothing else. An error of any class is no answer to GRANT.

Errors: NotFound, Conflict, Invalid, Unavailable, JournalError and NotAuthorized reach the caller as
PeerRefused with the same code. Anything else raised is a defect here: the caller sees PeerTimedOut,
because nobody knows how far the call came.
"""

from dataclasses import dataclass
from typing import Final, Protocol

from migrd.core.facts import TransferAddress, TransferSettings, VmSpec
from migrd.core.tracking import Migratability
from migrd.engine.ports import DestinationView, HostProfile, SourceView

PEER_PROTOCOL: Final = 1
"""Version of the messages between daemons. It grows when an old daemon would misunderstand a new
one; fields that may be ignored are added without."""


@dataclass(frozen=True)
class HelloFacts:
    """Who answers, before anything is asked of it."""

    host: str
    migrd_version: str
    protocol: int = PEER_PROTOCOL


class PeerService(Protocol):
    """This host, as other hosts' migrd see it."""

    def hello(self) -> HelloFacts: ...

    def incoming_source(self, migration_id: str) -> str | None:
        """The source of a migration this host is the destination of; None when there is none."""

    def outgoing_destination(self, migration_id: str) -> str | None:
        """The destination of a migration this host is the source of; None when there is none."""

    async def preflight(self, source: str, vm: VmSpec) -> HostProfile:
        """What `source` needs to know before it asks for anything. Changes nothing."""

    async def prepare(
        self,
        source: str,
        migration_id: str,
        epoch: int,
        vm: VmSpec,
        settings: TransferSettings,
        *,
        least: Migratability | None = None,
    ) -> DestinationView:
        """Store the incoming migration, then launch the waiting QEMU.

        Asked again with the same id: the view as it is. Raises Conflict (`stale_epoch`,
        `vm_present`, `less_migratable_there`: below `least`, ...), Unavailable (`no_slot`),
        Invalid, NotFound (profile), JournalError.
        """

    async def view(
        self, source: str, migration_id: str, *, newer_than: int, wait_s: float
    ) -> DestinationView:
        """The destination's side now, or as soon as its generation exceeds `newer_than`; at the
        latest after `wait_s` (0: at once). May be cancelled. Raises NotFound."""

    async def grant(
        self, source: str, migration_id: str, epoch: int, *, run_guest: bool
    ) -> DestinationView:
        """GRANT: journal owned and starting, run the guest, answer with where it stands.

        May answer before the guest runs (phase `owned` or `starting`); the source then asks
        `view`. Raises NotFound, Conflict (`stale_epoch`, `not_loaded`), JournalError.
        """

    async def discard(
        self, source: str, migration_id: str, epoch: int, reason: str
    ) -> DestinationView:
        """The source will never grant this migration: refuse durably and clean up.

        Raises NotFound for a migration never heard of. A `prepare` that was on its way may still
        arrive after that; nobody will grant it, so the deadline of its phase refuses it.
        """

    async def listen_for_recovery(self, source: str, migration_id: str) -> TransferAddress:
        """Postcopy is broken: pause, and listen for the source's new connection."""

    async def source_view(self, destination: str, migration_id: str) -> SourceView:
        """This host's side of a migration to `destination`. Raises NotFound."""
