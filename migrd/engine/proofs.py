"""What this host's journal proves of a VM, whatever the arbiter's record says.

A record may be behind the truth: a durable refusal, a guest that left by postcopy, and everything
that happened while there was no arbiter. What is proven here is written over it; what is disproven
here is never started on its word, and put right when somebody asks for it here: else each host
would send a person to the other one.
"""

from collections.abc import Mapping
from dataclasses import replace

from migrd.core.handover import DestinationPhase
from migrd.core.phases import Phase
from migrd.engine.arbiter_port import Ownership
from migrd.engine.incoming import Incoming
from migrd.engine.outgoing import Outgoing
from migrd.engine.ports import Vmm
from migrd.engine.vms import VmTable


class Proofs:
    """By the migrations of this host, in both directions."""

    def __init__(
        self,
        host: str,
        vms: VmTable,
        outgoing: Mapping[str, Outgoing],
        incoming: Mapping[str, Incoming],
    ) -> None:
        self._host = host
        self._vms = vms
        self._outgoing = outgoing
        self._incoming = incoming

    def proves(self, record: Ownership) -> bool:
        """Does this host's journal prove that the guest is this host's, although the arbiter's
        record says otherwise? It was kept, or came back, or came here, by that very migration; or
        it lives here since."""
        self._vms.note_epoch(record.vm, record.epoch)  # epochs only grow, wherever they were seen
        id_ = record.migration_id or ""
        m, i = self._outgoing.get(id_), self._incoming.get(id_)
        if m is not None:
            return m.state.is_terminal and not m.has_left and m.state.epoch == record.epoch
        if i is not None and i.state.phase is DestinationPhase.RUNNING:
            return i.state.epoch == record.epoch
        return self._lives_here_since(record)

    def _lives_here_since(self, record: Ownership) -> bool:
        """The guest lives in the very process that it came into, from the host that the record
        names, after that record was written: it moved while there was no arbiter."""
        entry = self._vms.get(record.vm)
        if entry is None or not entry.here or entry.vmm is None or entry.vmm.is_dead:
            return False
        if self.given_up(entry.vmm) is not None:
            return False
        return any(
            i.stored.instance == entry.vmm.instance
            and i.state.phase is DestinationPhase.RUNNING
            and i.stored.source == record.owner
            and i.state.epoch > record.epoch
            for i in self._incoming.values()
        )

    def given_up(self, vmm: Vmm) -> Outgoing | None:
        """The migration that ended as guest_lost, and left this process, stopped or dead."""
        for m in self._outgoing.values():
            if m.vmm.instance == vmm.instance and m.state.phase is Phase.GUEST_LOST:
                return m
        return None

    def disproves(self, record: Ownership) -> Ownership | None:
        """What a record that names this host should say, where it is behind the truth: the guest
        was refused here, or has left (by postcopy, or while there was no arbiter, or the write came
        late) and not come back."""
        if record.owner != self._host:
            return None
        i = self._incoming.get(record.migration_id or "")
        if i is not None and i.state.epoch == record.epoch:
            is_refused = i.state.phase is DestinationPhase.REFUSED
            return _of(record, i.stored.source, i.state.epoch, i.id) if is_refused else None
        gone = [m for m in self._outgoing.values() if m.stored.request.vm == record.vm]
        gone = [m for m in gone if m.has_left and _is_of_or_before(record, m)]
        if not gone:
            return None
        last = max(gone, key=lambda m: m.state.epoch)
        for came in self._incoming.values():
            is_newer = came.stored.spec.name == record.vm and came.state.epoch > last.state.epoch
            if is_newer and came.state.phase is DestinationPhase.RUNNING:
                return None
        return _of(record, last.stored.request.destination, last.state.epoch, last.id)


def _of(record: Ownership, owner: str, epoch: int, migration_id: str) -> Ownership:
    epoch = max(epoch, record.epoch)
    return replace(record, owner=owner, epoch=epoch, started=True, migration_id=migration_id)


def _is_of_or_before(record: Ownership, m: Outgoing) -> bool:
    return record.epoch < m.state.epoch or record.migration_id == m.id
