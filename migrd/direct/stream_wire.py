"""The memory stream between two hosts, version 1: what goes over each of its connections.

    source                                   destination
    OPENING            on each of 1..16 channels       -> ACCEPTED, or ABORT
    MANIFEST           on channel 0                    -> READY once the regions are there
    MEMORY*            on any channel, any order
    ROUND_END          on each channel                 -> ROUND_DONE once all before it is in place
    ...                more rounds
    DEVICE* STATE*     on channel 0, in order
    FINISH             on channel 0                    -> LOADED once the guest could run

All numbers are little-endian. A record is a header of 32 bytes and a body:

    u16 type | u16 flags | u32 entries | u32 body_bytes | u32 0 | u64 sequence | u64 digest

`sequence` counts the records of this direction of this channel from 0: a record left out, told
twice or out of its order shows. `digest` is the xxh3_64 of the body. For MEMORY it is the xxh3_64
of the payload seeded with the xxh3_64 of the table, so that both are read once, while in cache.
The chain of a channel is c' = xxh3_64(header, seed=c) from c = 0 over all records of the source: it
covers all bytes, and both sides compare it, with the totals, at each ROUND_END and at FINISH. xxh3
finds accidents, not attackers: against those there is TLS.

    OPENING      magic "MIGRDMEM" | u16 version | u16 channel | u16 channels | u16 0 | u64 epoch |
                 migration id (64 bytes UTF-8, NUL padded) | session (16 random bytes): no header
    MANIFEST     JSON: {"client": str, "regions": [[id, gpa, length_bytes]...], "devices": [str...]}
    MEMORY       `entries` times {u32 region | u32 kind | u64 offset | u64 length_bytes}, then the
                 bytes of all entries of kind DATA, one after the other. Kind ZERO has no bytes
    ROUND_END    u64 round (from 1) | u64 data_pages | u64 zero_pages | u64 chain before this
    ROUND_DONE   the same, as the destination counted
    DEVICE       u32 index in the manifest's devices | bytes
    STATE        bytes; flag LAST on the last one
    FINISH       u64 rounds | u64 device_bytes | u64 state_bytes, then for each channel
                 {u64 data_pages | u64 zero_pages | u64 chain}, before this record
    ABORT        code | NUL | a sentence, UTF-8; in both directions, then the connection ends

Two rounds never overlap: the source starts the next when every channel has answered ROUND_END, so
that no older copy of a page can overwrite a newer one. Within a round the source tells each page at
most once; the destination does not keep books of single pages, but it lets no round carry more than
the whole memory once, and a page told twice is harmless to all but the source's own guest.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Self

import xxhash

VERSION: Final = 1
MAGIC: Final = b"MIGRDMEM"
CHANNELS_MAX: Final = 16
SESSION_BYTES: Final = 16
PAYLOAD_BYTES: Final = 1 << 20
"""Of the DATA entries of one MEMORY record, at most."""
ENTRIES_MAX: Final = PAYLOAD_BYTES // 4096
"""Of one MEMORY record: one for each page."""
CHUNK_BYTES: Final = 2 << 20
"""Of one DEVICE or STATE record, at most."""
MANIFEST_BYTES: Final = 1 << 18
ABORT_BYTES: Final = 2048
LAST: Final = 1
"""Flag of the last STATE record."""

_HEADER: Final = struct.Struct("<HHIIIQQ")
_OPENING: Final = struct.Struct("<8sHHHHQ64s16s")
_ROUND: Final = struct.Struct("<QQQQ")
_FINISH: Final = struct.Struct("<QQQ")
_TALLY: Final = struct.Struct("<QQQ")
ENTRY: Final = struct.Struct("<IIQQ")
DEVICE: Final = struct.Struct("<I")
HEADER_BYTES: Final = _HEADER.size
OPENING_BYTES: Final = _OPENING.size


class Type(IntEnum):
    """Of a record."""

    ACCEPTED = 1
    MANIFEST = 2
    READY = 3
    MEMORY = 4
    ROUND_END = 5
    ROUND_DONE = 6
    DEVICE = 7
    STATE = 8
    FINISH = 9
    LOADED = 10
    ABORT = 11


class Kind(IntEnum):
    """Of an entry of a MEMORY record."""

    DATA = 0
    ZERO = 1


BODY_MAX: Final = {
    Type.ACCEPTED: 0,
    Type.MANIFEST: MANIFEST_BYTES,
    Type.READY: 0,
    Type.MEMORY: ENTRIES_MAX * ENTRY.size + PAYLOAD_BYTES,
    Type.ROUND_END: _ROUND.size,
    Type.ROUND_DONE: _ROUND.size,
    Type.DEVICE: DEVICE.size + CHUNK_BYTES,
    Type.STATE: CHUNK_BYTES,
    Type.FINISH: _FINISH.size + CHANNELS_MAX * _TALLY.size,
    Type.LOADED: 0,
    Type.ABORT: ABORT_BYTES,
}


class WireError(ValueError):
    """These bytes are no stream of this version; says what is wrong with them."""


@dataclass(frozen=True)
class Opening:
    """What each connection begins with."""

    migration_id: str
    epoch: int
    session: bytes
    channel: int
    channels: int

    def pack(self) -> bytes:
        name = self.migration_id.encode()
        if not 0 < len(name) <= 64 or b"\0" in name:
            raise WireError(f"migration id {self.migration_id!r}: 1 to 64 bytes without NUL")
        return _OPENING.pack(
            MAGIC, VERSION, self.channel, self.channels, 0, self.epoch, name, self.session
        )

    @classmethod
    def unpack(cls, packed: bytes) -> Self:
        """Raises WireError."""
        magic, version, channel, channels, _, epoch, name, session = _OPENING.unpack(packed)
        if magic != MAGIC:
            raise WireError("the connection does not begin as a memory stream does")
        if version != VERSION:
            raise WireError(f"memory stream of version {version}; this migrd speaks {VERSION}")
        if not (0 < channels <= CHANNELS_MAX and channel < channels):
            raise WireError(f"channel {channel} of {channels}: at most {CHANNELS_MAX} there are")
        try:
            return cls(name.rstrip(b"\0").decode(), epoch, session, channel, channels)
        except UnicodeDecodeError as failure:
            raise WireError("the migration id is no UTF-8") from failure


@dataclass(frozen=True)
class Header:
    """Of a record."""

    type: Type
    flags: int
    entries: int
    body_bytes: int
    sequence: int
    digest: int

    def pack(self) -> bytes:
        return _HEADER.pack(
            self.type, self.flags, self.entries, self.body_bytes, 0, self.sequence, self.digest
        )

    @classmethod
    def unpack(cls, packed: bytes | bytearray | memoryview) -> Self:
        """Raises WireError, also for a body longer than its type may have."""
        number, flags, entries, body_bytes, _, sequence, digest = _HEADER.unpack(packed)
        try:
            kind = Type(number)
        except ValueError:
            raise WireError(f"record of unknown type {number}") from None
        if body_bytes > BODY_MAX[kind]:
            raise WireError(f"{kind.name} of {body_bytes} bytes: at most {BODY_MAX[kind]}")
        return cls(kind, flags, entries, body_bytes, sequence, digest)


@dataclass(frozen=True)
class Tally:
    """What one channel has carried so far."""

    data_pages: int = 0
    zero_pages: int = 0
    chain: int = 0


@dataclass(frozen=True)
class RoundEnd:
    round: int
    tally: Tally

    def pack(self) -> bytes:
        tally = self.tally
        return _ROUND.pack(self.round, tally.data_pages, tally.zero_pages, tally.chain)

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """Raises WireError."""
        if len(body) != _ROUND.size:
            raise WireError(f"end of a round of {len(body)} bytes instead of {_ROUND.size}")
        number, data_pages, zero_pages, chain = _ROUND.unpack(body)
        return cls(number, Tally(data_pages, zero_pages, chain))


@dataclass(frozen=True)
class Finish:
    rounds: int
    device_bytes: int
    state_bytes: int
    channels: tuple[Tally, ...]

    def pack(self) -> bytes:
        head = _FINISH.pack(self.rounds, self.device_bytes, self.state_bytes)
        rows = (_TALLY.pack(one.data_pages, one.zero_pages, one.chain) for one in self.channels)
        return head + b"".join(rows)

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """Raises WireError."""
        rows = len(body) - _FINISH.size
        if rows < 0 or rows % _TALLY.size:
            raise WireError(f"FINISH of {len(body)} bytes")
        tallies = tuple(Tally(*row) for row in _TALLY.iter_unpack(body[_FINISH.size :]))
        rounds, device_bytes, state_bytes = _FINISH.unpack_from(body)
        return cls(rounds, device_bytes, state_bytes, tallies)


def digest_of(body: bytes | bytearray | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(body)


def memory_digest(table: bytes | memoryview, payload: bytes | bytearray | memoryview) -> int:
    """Of a MEMORY record."""
    return xxhash.xxh3_64_intdigest(payload, seed=xxhash.xxh3_64_intdigest(table))


def chained(chain: int, header: bytes | bytearray | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(header, seed=chain)


def abort_body(code: str, message: str) -> bytes:
    return f"{code}\0{message}".encode()[:ABORT_BYTES]


def abort_words(body: bytes) -> tuple[str, str]:
    """Code and sentence; never fails, and what people read holds no control characters."""
    code, _, message = body.decode(errors="replace").partition("\0")
    cleaned = "".join(one if one.isprintable() else " " for one in message)
    return code if code.isidentifier() else "aborted", cleaned or "without giving a reason"
