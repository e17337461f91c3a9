"""What the destination is to rebuild: the stream's first record."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from migrd.core.memory_map import MemoryMap
from migrd.direct.stream_wire import MANIFEST_BYTES, WireError

_NAME_LENGTH = 72
_DEVICES = 256


@dataclass(frozen=True)
class Manifest:
    """The guest's memory, its devices by their ids, and what kind of process had it."""

    memory: MemoryMap
    devices: tuple[str, ...] = ()
    client: str = ""

    def pack(self) -> bytes:
        """Raises WireError: the other side would refuse it."""
        regions = [[one.id, one.gpa, one.length_bytes] for one in self.memory.regions]
        told = {"client": self.client, "regions": regions, "devices": list(self.devices)}
        packed = json.dumps(told).encode()
        if len(packed) > MANIFEST_BYTES:
            raise WireError(f"a manifest of {len(packed)} bytes: at most {MANIFEST_BYTES}")
        type(self).unpack(packed)
        return packed

    @classmethod
    def unpack(cls, packed: bytes) -> Self:
        """Raises WireError for anything that is no manifest, Invalid for regions that cannot be."""
        try:
            told = json.loads(packed)
        except (ValueError, RecursionError) as failure:
            raise WireError(f"the manifest is no JSON: {failure}") from failure
        if not isinstance(told, dict):
            raise WireError("the manifest is no JSON object")
        pieces = list(_pieces(told.get("regions")))
        devices = told.get("devices")
        if not isinstance(devices, list) or len(devices) > _DEVICES:
            raise WireError(f"the manifest's devices are no list of at most {_DEVICES} ids")
        names = tuple(_name(one, "device id") for one in devices)
        if len(set(names)) != len(names):
            raise WireError("the manifest names a device twice")
        client = _name(told.get("client"), "client", is_optional=True)
        return cls(MemoryMap.of(pieces), names, client)


def _pieces(regions: Any) -> Iterator[tuple[int, int, int]]:
    if not isinstance(regions, list):
        raise WireError("the manifest has no list of regions")
    for one in regions:
        if not (isinstance(one, list) and len(one) == 3 and all(type(n) is int for n in one)):
            raise WireError(f"the manifest's region {str(one)[:80]} is not [id, gpa, length]")
        region_id, gpa, length_bytes = one
        yield region_id, gpa, length_bytes


def _name(found: Any, what: str, *, is_optional: bool = False) -> str:
    is_name = isinstance(found, str) and found.isprintable() and len(found) <= _NAME_LENGTH
    if is_name and (found or is_optional):
        return str(found)
    raise WireError(f"the manifest's {what} {str(found)[:80]!r} is no name")
