"""What the engine concludes from the arbiter's record of a VM, and how it is kept right.

    claim        before a start or a migration: the record says that this host has the VM
    as_source    the record, as the source of a granted migration reads it
    as_target    the same, as its destination does

A record may be behind the truth: a refusal is durable while the arbiter is away, and a guest that
went by postcopy does not wait for it. What this host's own journal proves (`Proof`) is written over
it at the next claim, so a stale record never keeps a VM from being started or moved.
"""

import contextlib
from collections.abc import Callable
from enum import StrEnum
from typing import Final

from migrd.engine.arbiter_port import Arbiter, Ownership
from migrd.engine.world import World
from migrd.errors import ArbiterConflict, ArbiterUnavailable, Conflict

UNREACHABLE: Final = "ArbiterUnreachable"
"""The standing condition while the arbiter does not answer."""
CLAIM_TRIES: Final = 3
"""A write of an earlier migration of this host may arrive late, between a look and what is written
on it; there are as many as it had writes under way."""

Proof = Callable[[Ownership], bool]
"""Does this host's journal prove that the guest is this host's, whatever that record says?"""
Disproof = Callable[[Ownership], Ownership | None]
"""What the record should say, where this host's journal proves that the guest is not this host's,
whatever that record says; None: it proves nothing of the kind."""


class Standing(StrEnum):
    """Of a granted migration, by the record."""

    OURS = "ours"
    """As it was when the grant was decided: the grant may still be under way."""
    GIVEN = "given"
    """The destination's, which has not yet said that it starts the guest."""
    STARTED = "started"
    """The destination's for good, unless a fence proves otherwise."""
    BACK = "back"
    """This host's at a newer revision: no grant can take effect any more."""
    LOST = "lost"
    """There is no record, or it is of somebody or something else."""
    UNKNOWN = "unknown"
    """The arbiter does not answer."""


def as_source(
    record: Ownership | None, here: str, there: str, epoch: int, decided_on: int | None
) -> Standing:
    """`decided_on`: the revision that the grant was decided on; None: it was not known (the guest
    cannot come back here, and nothing can rule its grant out)."""
    if record is None or record.epoch != epoch:
        return Standing.LOST
    if record.owner == there:
        return Standing.STARTED if record.started else Standing.GIVEN
    if record.owner != here:
        return Standing.LOST
    is_newer = decided_on is not None and record.revision > decided_on
    return Standing.BACK if is_newer else Standing.OURS


def as_target(record: Ownership | None, here: str, epoch: int) -> Standing:
    """GIVEN or STARTED: this host may start the guest, or has said that it does; OURS stands for
    the source's; LOST for everything else."""
    if record is None or record.epoch != epoch:
        return Standing.LOST
    if record.owner != here:
        return Standing.OURS
    return Standing.STARTED if record.started else Standing.GIVEN


def present(world: World) -> Arbiter:
    """Raises ArbiterUnavailable: a migration that began with an arbiter goes on with one."""
    if not world.arbiter.is_present:
        raise ArbiterUnavailable(
            "this host is configured without the arbiter that says who runs this guest: set "
            "[arbiter] as it was, and restart migrd",
            code="arbiter_missing",
        )
    return world.arbiter


async def claim(
    arbiter: Arbiter, vm: str, host: str, epoch: int, migration_id: str, proves: Proof
) -> Ownership:
    """The record says (host, epoch, started) afterwards.

    Raises Conflict (`owned_elsewhere`, `stale_epoch`), or ArbiterUnavailable.
    """
    with contextlib.suppress(ArbiterConflict):
        return await arbiter.claim(vm, host, epoch, migration_id)
    for _ in range(CLAIM_TRIES):
        found = await arbiter.read(vm)
        is_proven = found is not None and proves(found)
        if found is None or not (is_proven or found.owner == host):
            raise elsewhere(vm, found)
        if found.epoch > epoch:
            raise Conflict(
                f"the arbiter has seen {vm} at epoch {found.epoch}, this host only at {epoch - 1}: "
                "ask again, and the next one will be used",
                code="stale_epoch",
            )
        with contextlib.suppress(ArbiterConflict):  # written since it was read: look again
            return await arbiter.assign(
                found, host, epoch=epoch, started=True, migration_id=migration_id
            )
    raise overtaken(vm, await arbiter.read(vm), host)


async def claim_to_start(
    arbiter: Arbiter, vm: str, host: str, epoch: int, proves: Proof, disproves: Disproof
) -> Ownership:
    """The record says (host, started) afterwards, at `epoch` or the newer one that it had. What was
    read is what is changed: a grant that comes in between is no start.

    Raises Conflict (`owned_elsewhere`), or ArbiterUnavailable.
    """
    found = await arbiter.read(vm)
    try:
        if found is None:
            return await arbiter.claim(vm, host, epoch, None)
        right = disproves(found)
        if right is not None:
            await put(arbiter, found, right)
            raise elsewhere(vm, right)
        if not (proves(found) or found.owner == host):
            raise elsewhere(vm, found)
        # written also when it says so already: the new revision rules out a late write, such as a
        # removal that was not answered
        return await arbiter.assign(found, host, epoch=max(epoch, found.epoch), started=True)
    except ArbiterConflict:
        raise overtaken(vm, await arbiter.read(vm), host) from None


async def put(arbiter: Arbiter, found: Ownership, right: Ownership) -> Ownership:
    """Write what a record should say over what it says. Raises ArbiterError."""
    return await arbiter.assign(
        found,
        right.owner,
        epoch=right.epoch,
        started=right.started,
        run_guest=right.run_guest,
        migration_id=right.migration_id,
    )


def overtaken(vm: str, found: Ownership | None, host: str) -> Conflict:
    """Why the VM is not this host's yet, when its record changed between two looks."""
    if found is None or found.owner != host:
        return elsewhere(vm, found)
    return Conflict(
        f"the arbiter's record of {vm} names {host} and was changed a moment ago: ask again",
        code="owned_elsewhere",
    )


def elsewhere(vm: str, found: Ownership | None) -> Conflict:
    """Why the VM is not this host's to run, with the cure."""
    if found is None:
        return Conflict(
            f"the arbiter's record of {vm} was removed a moment ago: ask again",
            code="owned_elsewhere",
        )
    what = "runs" if found.started else "was granted"
    return Conflict(
        f"the arbiter says that {vm} {what} on {found.owner} (epoch {found.epoch}): ask migrd on "
        f"{found.owner} for it. When it knows no {vm} (a start was cut short there), define it "
        f"there and forget it there. When that host is gone for good, prove it (power it off), "
        f"and remove the record: etcdctl del PREFIX/vms/{vm} ([arbiter] prefix)",
        code="owned_elsewhere",
    )
