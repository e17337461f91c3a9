"""The hardware of the scripted engine: a made-up host, as clients see it."""

from collections.abc import Sequence

from migrd.engine.device_verdict import judge
from migrd.engine.service import DeviceView
from migrd.errors import Conflict, NotFound
from tests.fakes.inventory import mixed_host


class ScriptedDevices:
    """The part of Service that is about devices."""

    version = 1

    def __init__(self) -> None:
        self.inventory = mixed_host()
        self.devices_in_use: dict[str, str] = {}
        """Address -> VM."""
        self.probed: list[str] = []

    def devices(self) -> tuple[int, Sequence[DeviceView]]:
        return self.version, [self.device(address) for address in sorted(self.inventory.devices)]

    def device(self, address: str) -> DeviceView:
        device = self.inventory.devices.get(address)
        if device is None:
            raise NotFound(f"{address} is no device of this host", code="unknown_device")
        verdict = judge(device, self.inventory)
        return DeviceView(device, verdict, 1, self.devices_in_use.get(address))

    async def probe_device(self, address: str, *, by: str) -> DeviceView:
        del by
        if address in self.devices_in_use:
            raise Conflict(f"{address} is in use", code="device_in_use")
        self.probed.append(address)
        return self.device(address)
