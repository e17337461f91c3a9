"""Who may run a VM, said by a third party: the port, and what the engine may conclude from it.

    record of a VM: (owner, epoch, started, run_guest, migration_id) at a revision
                                           changed by compare-and-swap on that revision, never else

    source                                 record                      destination
    preparing: claim                       (source, n, yes)      r
    switchover over: journal granted with r
    assign to the destination              (destination, n, no)  r+1
    GRANT -----------------------------------------------------------> journal owned
                                           (destination, n, yes) r+2 <-- mark started
                                                                       journal starting; cont
    no answer, not started: take back      (source, n, yes)            its mark fails: refused

Rules
1. A lease tells that a daemon is there (the roster), never who may run a guest.
2. The destination starts only after it has read (itself, this epoch, started).
3. The source runs its guest again only when it has read (itself) at a revision newer than the one
   that its grant was decided on, which rules out a grant that is still under way; or when the
   destination has durably refused, which is final whatever the record says (the record is then put
   right as soon as the arbiter answers).
4. A record that says `started` for another host is taken back on proof alone (`fenced`).
5. ArbiterUnavailable says "not known whether it took effect": read again, never assume.

Without an arbiter (`kind = "journal"`, the default) the two journals decide alone
(core.handover); NoArbiter agrees to everything and knows nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol


@dataclass(frozen=True)
class Ownership:
    """The record of a VM, as it was read."""

    vm: str
    owner: str
    """Name of the host that may run the guest."""
    epoch: int
    started: bool
    """False: granted to `owner`, which has not yet said that it starts the guest."""
    revision: int
    """Of the record; every change makes it larger."""
    run_guest: bool = True
    """With a grant: the guest is to run there (else it was paused, and stays so)."""
    migration_id: str | None = None


@dataclass(frozen=True)
class ArbiterState:
    """What is known of the arbiter, for people and for readiness."""

    kind: str
    """`journal` or `etcd`."""
    is_reachable: bool
    since_wall_s: float | None = None
    """When it became so; None: not tried yet, or no arbiter."""
    problem: str | None = None
    """Why it is not reachable, with the cure."""
    endpoints: Sequence[str] = ()
    hosts: Sequence[str] | None = None
    """Hosts whose lease lives (liveness, nothing more); None: not known."""


NO_RECORD: Final = 0
"""The revision of a record that there is none of."""


class Arbiter(Protocol):
    """The third party. Every call has a deadline of its own (`[arbiter] request_timeout_ms`) and
    raises ArbiterUnavailable (nothing is known of its effect) or ArbiterConflict (the record is
    not what the call was decided on: nothing was changed; read it)."""

    @property
    def is_present(self) -> bool:
        """False: the journals decide alone, and no other call is made."""

    @property
    def state(self) -> ArbiterState:
        """Without I/O: the last that was seen."""

    async def read(self, vm: str) -> Ownership | None:
        """The record now (linearizable); None: there is none."""

    async def claim(self, vm: str, host: str, epoch: int, migration_id: str | None) -> Ownership:
        """Make sure that the record says (host, epoch, started): the guest runs, or is about to be
        started, on `host`. Creates it, or raises the epoch of a record that is `host`'s already;
        writes nothing when it says so already. ArbiterConflict when it is another host's, or of a
        newer epoch."""

    async def assign(
        self,
        record: Ownership,
        owner: str,
        *,
        epoch: int,
        started: bool,
        run_guest: bool = True,
        migration_id: str | None = None,
    ) -> Ownership:
        """One compare-and-swap on `record.revision` (NO_RECORD: it is created). Applied twice it
        is applied once: when the record is found to say already what was to be written, by this
        migration, that is success."""

    async def forget(self, record: Ownership) -> None:
        """Remove the record of a VM that is no more, if it is as it was read."""


class NoArbiter:
    """The journals decide alone. Calls of the record are defects: see `is_present`."""

    is_present: Final = False
    state: Final = ArbiterState("journal", is_reachable=True)

    async def read(self, vm: str) -> Ownership | None:
        raise AssertionError("no arbiter")

    async def claim(self, vm: str, host: str, epoch: int, migration_id: str | None) -> Ownership:
        raise AssertionError("no arbiter")

    async def assign(
        self,
        record: Ownership,
        owner: str,
        *,
        epoch: int,
        started: bool,
        run_guest: bool = True,
        migration_id: str | None = None,
    ) -> Ownership:
        raise AssertionError("no arbiter")

    async def forget(self, record: Ownership) -> None:
        raise AssertionError("no arbiter")
