"""Asking one QEMU about its passthrough devices.

Some questions per device, so they are asked only where there is one. What a QEMU does not answer
(an older one has no property `iommufd`) stays unknown.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from migrd.core.facts import PassthroughFacts
from migrd.qemu import passthrough
from migrd.qemu.passthrough import DEVICES_BOUND, KnownDevices
from migrd.qemu.plug import iommufd_of
from migrd.qemu.preparation import Ask
from migrd.qemu.seen import Seen
from migrd.qemu.wire import CommandRefused


async def ask_devices(
    ask: Ask,
    ids: Sequence[str],
    known: KnownDevices,
    seen: Seen,
    blocked_reasons: Sequence[str],
) -> tuple[PassthroughFacts, ...]:
    """Each of the devices that QEMU has. Raises as `ask`."""
    if not ids:
        return ()
    states = dict(seen.device_states)
    devices = []
    for id_ in ids[:DEVICES_BOUND]:
        address, iommufd, bus, slot = await asyncio.gather(
            _address(ask, id_, known),
            iommufd_of(ask, id_),
            _property(ask, id_, "parent_bus"),
            _property(ask, id_, "addr"),
        )
        devices.append(
            PassthroughFacts(
                id=id_,
                address=address,
                iommufd=iommufd,
                guest_bus=bus.rpartition("/")[2] if isinstance(bus, str) else None,
                guest_address=passthrough.read_slot(slot),
                device_state=states.get(id_),
                was_reset=id_ in seen.reset_devices,
            )
        )
    return passthrough.judged(devices, known.names, blocked_reasons)


async def _address(ask: Ask, id_: str, known: KnownDevices) -> str | None:
    """As noted; else what QEMU was given, if that was a name."""
    noted = known.address(id_)
    if noted is not None:
        return noted
    for name in ("host", "sysfsdev"):
        answer = await _property(ask, id_, name)
        if isinstance(answer, str) and answer.rpartition("/")[2]:
            return answer.rpartition("/")[2]
    return None


async def _property(ask: Ask, id_: str, name: str) -> Any:
    """None where this QEMU has no such property."""
    arguments = {"path": f"{passthrough.PERIPHERAL}/{id_}", "property": name}
    try:
        return await ask("qom-get", arguments)
    except CommandRefused:
        return None
