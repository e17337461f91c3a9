"""Records to bytes and back, for values of the core (which may not know pydantic).

    value --write--> Sealed(kind, version, body, crc) --read--> the same value, or UnreadableRecord

Rules
1. Every field is written, defaults too: a default that changes in a later version must not change
   what an old record means.
2. What is written has been read back and compared first. A record that could not be replayed would
   stop the next start, with a guest in the middle of its journey.
3. Reading is strict. A field that we do not know may carry a promise that we would break, so it
   stops the replay, as do an unknown trigger, another type or a wrong checksum. A field that is
   missing takes its default: an older version wrote the record.
4. A kind gets a new version when an older migrd could misread or not read its records any more,
   which a new field is enough for: the older migrd then refuses the file before it touches it
   (`opening`). `upgrades` brings the fields of older versions up, one version at a time, as they
   are read; what is on disk stays as it was written. (tests/journal/test_versions.py holds each
   kind to the fields of its version.)
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Generic, TypeVar

import orjson
from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from migrd.core.handover import DestinationEvent
from migrd.core.migration import MigrationEvent
from migrd.engine.ports import StoredIncoming, StoredRequest, StoredResolution, StoredVm

T = TypeVar("T")

Upgrade = Callable[[dict[str, Any]], dict[str, Any]]
"""The fields of a record of version n -> those of version n + 1. May raise UnreadableRecord."""


class UnreadableRecord(Exception):
    """The record is not understood; the message says what about it."""


@dataclass(frozen=True)
class Sealed:
    """A record as it stands on disk."""

    kind: str
    version: int
    body: bytes
    crc: int


class Codec(Generic[T]):
    """Writes and reads one kind of record."""

    def __init__(
        self,
        kind: str,
        version: int,
        type_: type[T],
        upgrades: Mapping[int, Upgrade] = MappingProxyType({}),
    ) -> None:
        """`upgrades`: version n -> to n + 1, for each n below `version`. Raises ValueError for any
        that is missing."""
        if set(upgrades) != set(range(1, version)):
            raise ValueError(f"{kind}: version {version} needs an upgrade from each before it")
        self.kind = kind
        self.version = version
        self._upgrades = upgrades
        self.type: type[Any] = type_
        self._adapter = TypeAdapter(type_)  # slow to build: at import, never on the event loop

    def write(self, value: T) -> Sealed:
        """Raises UnreadableRecord for a value that would not come back as it is (NaN, say)."""
        try:
            body = self._adapter.dump_json(value)
        except PydanticSerializationError as failure:  # half a surrogate pair in a text, say
            raise UnreadableRecord(f"it cannot be written: {failure}") from None
        sealed = Sealed(self.kind, self.version, body, self._checksum(self.version, body))
        if self.read(sealed) != value:
            raise UnreadableRecord(f"{value!r} would not be read back as it is")
        return sealed

    def read(self, sealed: Sealed) -> T:
        if sealed.kind != self.kind:
            raise UnreadableRecord(f"kind {sealed.kind!r}, {self.kind!r} expected")
        if not 1 <= sealed.version <= self.version:
            raise UnreadableRecord(
                f"{self.kind} of version {sealed.version}; this migrd knows 1 to {self.version}"
            )
        if sealed.crc != self._checksum(sealed.version, sealed.body):
            raise UnreadableRecord("the checksum does not match: the record was altered")
        body = self._brought_up(sealed)
        try:
            value = self._adapter.validate_json(body, strict=True)
        except ValidationError as failure:
            raise UnreadableRecord(_first_of(failure)) from None
        unknown = _unknown_in(orjson.loads(body), orjson.loads(self._adapter.dump_json(value)), "")
        if unknown is not None:
            raise UnreadableRecord(f"{unknown} is not known to this version")
        return value

    def _brought_up(self, sealed: Sealed) -> bytes:
        """The body in the words of this version."""
        if sealed.version == self.version:
            return sealed.body
        try:
            fields = orjson.loads(sealed.body)
            for version in range(sealed.version, self.version):
                fields = self._upgrades[version](fields)
            return orjson.dumps(fields)
        except (LookupError, TypeError, ValueError, AttributeError) as failure:
            raise UnreadableRecord(
                f"{self.kind} of version {sealed.version} cannot be brought to {self.version}: "
                f"{type(failure).__name__}: {failure}"
            ) from None

    def _checksum(self, version: int, body: bytes) -> int:
        return zlib.crc32(body, zlib.crc32(f"{self.kind}/{version}".encode()))


def _first_of(failure: ValidationError) -> str:
    first = failure.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "record"
    return f"{place}: {first['msg']} (found {first['input']!r:.80})"


def _unknown_in(stored: Any, understood: Any, path: str) -> str | None:
    """The first field of `stored` that reading it dropped or changed."""
    if isinstance(stored, dict) and isinstance(understood, dict):
        for key, value in stored.items():
            where = f"{path}.{key}" if path else str(key)
            if key not in understood:
                return f"field {where}"
            if (found := _unknown_in(value, understood[key], where)) is not None:
                return found
        return None
    if isinstance(stored, list) and isinstance(understood, list) and len(stored) == len(understood):
        if _are_words(stored) and sorted(stored) == sorted(understood):
            return None  # a set of words: each process writes it in an order of its own
        pairs = enumerate(zip(stored, understood, strict=True))
        return next(
            (found for n, (a, b) in pairs if (found := _unknown_in(a, b, f"{path}.{n}"))), None
        )
    return None if stored == understood else f"the value of {path or 'the record'}"


def _are_words(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


MIGRATION_EVENT: Final = Codec("migration_event", 1, MigrationEvent)
DESTINATION_EVENT: Final = Codec("destination_event", 1, DestinationEvent)
REQUEST: Final = Codec("request", 1, StoredRequest)
INCOMING: Final = Codec("incoming", 1, StoredIncoming)
VM: Final = Codec("vm", 1, StoredVm)
RESOLUTION: Final = Codec("resolution", 1, StoredResolution)

ALL: Final[tuple[Codec[Any], ...]] = (
    MIGRATION_EVENT,
    DESTINATION_EVENT,
    REQUEST,
    INCOMING,
    VM,
    RESOLUTION,
)
NEWEST: Final[Mapping[str, int]] = MappingProxyType({of.kind: of.version for of in ALL})
"""Kind of record -> the newest version that is understood."""
