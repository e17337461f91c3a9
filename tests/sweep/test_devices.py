"""A daemon that is killed, or whose disk is full, at any call of a start or a plug with devices.

Whatever was struck, and once everything works again: what was asked for can be asked for again and
is done, what QEMU has is what is recorded, and nothing is held that nobody needs (the Pair looks at
its end).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest

from migrd.core.tracking import Migratability
from migrd.engine.service import PlugRequest
from migrd.errors import MigrdError, NotFound
from tests.engine.passthrough import NIC, NIC2, hardware, hosts, nic, spec_of
from tests.fakes.gate import Fault
from tests.fakes.virtual_time import until
from tests.fakes.world import VM, Pair
from tests.sweep.sweeping import UNCOUNTED, Strike, strikes

Act = Callable[[Pair], Awaitable[object]]
BOTH = {"hostdev0": NIC, "hostdev1": NIC2}


async def start(pair: Pair) -> None:
    """Define and start with two devices."""
    await pair.alpha.service.define_vm(spec_of(NIC, NIC2), dry_run=False)
    await pair.alpha.service.start_vm(VM)


async def plug(pair: Pair) -> None:
    """The second device is plugged."""
    request = PlugRequest(NIC2, "hostdev1", "pcie.0", "06.0")
    await pair.alpha.service.plug_device(VM, request, by="test")


async def unplug(pair: Pair) -> None:
    """And taken out again."""
    await pair.alpha.service.unplug_device(VM, "hostdev1", by="test")


async def nothing(pair: Pair) -> None:
    """The VM is not known yet."""


async def boot_one(pair: Pair) -> None:
    await pair.boot(devices={"hostdev0": NIC})


async def boot_both(pair: Pair) -> None:
    await pair.boot(devices=BOTH)


SWEPT = [
    (nothing, start, BOTH),
    (boot_one, plug, BOTH),
    (boot_both, unplug, {"hostdev0": NIC}),
]


class Listing(Strike):
    """Strikes nothing; remembers."""

    def __init__(self) -> None:
        super().__init__(0, "nothing", Fault(after_effect=False))
        self.calls: list[str] = []

    def __call__(self, call: str, number: int) -> Fault | None:
        if self.is_armed and call not in UNCOUNTED:
            self.calls.append(call)
        return None


async def run(before: Act, act: Act, has: dict[str, str], strike: Strike) -> None:
    """One run; a daemon that was killed is started again, and asked again."""
    async with hosts(hardware(nic(NIC), nic(NIC2)), watch_interval_s=7.0) as pair:
        pair.plans["alpha"] = strike
        await pair.restart("alpha")
        await before(pair)
        strike.is_armed = True
        try:
            await act(pair)
        except (MigrdError, asyncio.CancelledError):
            await asyncio.sleep(0.01)
        strike.is_armed = False
        await asyncio.sleep(0.1)  # a call that was struck already ends
        if pair.alpha.gate.is_dead:
            await pair.restart("alpha")
        await pair.alpha.engine.host.devices.first_look()
        await _again(pair, act)
        await until(lambda: pair.alpha.service.vm(VM).state == "running", within_s=30.0)
        view = pair.alpha.service.vm(VM)
        assert {d.id: d.address for d in view.spec.devices} == has
        qemu = pair.hosts["alpha"].qemu(VM)
        assert {d.id: d.address for d in qemu.devices.values()} == has
        assert view.decision is not None
        assert view.decision.plan.migratability is Migratability.LIVE
        assert set(view.decision.plan.attach_order) == set(has)


async def _again(pair: Pair, act: Act) -> None:
    """As a client does that got no answer: what is done already is no error to it."""
    if act is not unplug:
        await act(pair)
        return
    with contextlib.suppress(NotFound):
        await act(pair)


@pytest.mark.parametrize(("before", "act", "has"), SWEPT, ids=[act.__name__ for _, act, _ in SWEPT])
async def test_no_single_failure_leaves_devices_and_records_apart(
    before: Act, act: Act, has: dict[str, str]
) -> None:
    listing, failures = Listing(), []
    await run(before, act, has, listing)
    assert len(listing.calls) >= 4, listing.calls
    struck = 0
    for number, call in enumerate(listing.calls, 1):
        for name, fault in strikes(call):
            strike = Strike(number, name, fault)
            try:
                await run(before, act, has, strike)
            except (AssertionError, TimeoutError, MigrdError) as exc:
                failures.append(f"call {number}, {call}, {name}: {exc!r}")
            struck += strike.struck is not None
    assert not failures, "\n".join([f"{len(failures)} of the sweep:", *failures])
    assert struck >= len(listing.calls), "the sweep did not sweep"
