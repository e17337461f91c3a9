"""A destination that was taken out of the roster while a migration to it was going on.

Every call raises PeerUnreachable: nothing is known of it, and nothing is concluded from that.
"""

from typing import NoReturn

from migrd.core.facts import TransferAddress, TransferSettings, VmSpec
from migrd.core.tracking import Migratability
from migrd.engine.peer_service import HelloFacts
from migrd.engine.ports import DestinationView, HostProfile, SourceView
from migrd.errors import PeerUnreachable


class AbsentPeer:
    """Fulfils `ports.Peer` by saying that the host cannot be asked."""

    def __init__(self, name: str) -> None:
        self.name = name

    def _not_in_roster(self) -> NoReturn:
        raise PeerUnreachable(
            f"{self.name} is not in the roster any more: put it back ([peers.{self.name}]), a "
            "migration with it is not over"
        )

    async def hello(self) -> HelloFacts:
        self._not_in_roster()

    async def preflight(self, vm: VmSpec) -> HostProfile:
        self._not_in_roster()

    async def prepare(
        self,
        migration_id: str,
        epoch: int,
        vm: VmSpec,
        settings: TransferSettings,
        *,
        least: Migratability | None = None,
    ) -> DestinationView:
        self._not_in_roster()

    async def view(
        self, migration_id: str, *, newer_than: int = -1, wait_s: float = 0.0
    ) -> DestinationView:
        self._not_in_roster()

    async def grant(self, migration_id: str, epoch: int, *, run_guest: bool) -> DestinationView:
        self._not_in_roster()

    async def discard(self, migration_id: str, epoch: int, reason: str) -> DestinationView:
        self._not_in_roster()

    async def listen_for_recovery(self, migration_id: str) -> TransferAddress:
        self._not_in_roster()

    async def source_view(self, migration_id: str) -> SourceView:
        self._not_in_roster()
