"""The hand-over protocol: how a VMM gives migrd its memory, and what migrd asks of it then.

Any process with a guest in it (a VMM, a user-space driver) can be migrated by migrd once it speaks
this. `client.py` (Python) and `include/migrd_direct.h` (C11) speak it for their users; who writes
another client needs this page alone. This module is numbers, layouts, encode and decode: it imports
the standard library alone, does no I/O, and is what both ends share.

Transport: a unix socket of type SOCK_SEQPACKET, at `direct.socket`; the daemon listens. One packet
is one message; it is never split. All integers are little-endian, no padding but what is listed.
Descriptors ride along by SCM_RIGHTS, at most one a message, exactly where the table has an F.

    header   u32 magic "MGRD" | u16 type | u16 version | u32 length of the body | u32 serial

    type         from    fd  body
     1 HELLO       VMM       u32 state, u32 features, name vm, name instance, name migration_id
     2 REGION      VMM    F  u32 id, u32 0, u64 gpa, u64 length, u64 offset in the file, u64 hva
     3 SOURCE      VMM    F  u32 kind, u32 object id, u64 page size, u32 ranges, u32 0, ranges:
                             each u32 region id, u32 0, u64 offset in the region, u64 address,
                             u64 length
     4 DEVICE      VMM    F  name id: a VFIO device whose state migrd is to move
     5 OFFER_END   VMM       u32 regions, u32 sources, u32 devices, u32 0: how many were sent
     6 ANSWER      VMM   (F) u32 status, u32 state, u64 value, name migration_id, text[256]
     7 EVENT       VMM       u32 kind, text[256]
    33 WELCOME     migrd     u64 largest opaque state taken, in bytes
    34 ERROR       migrd     u32 code, text[512]; then migrd hangs up
    35 PAUSE       migrd
    36 RESUME      migrd
    37 SAVE_STATE  migrd     answered with F: the state, value: its length in bytes
    38 GIVE_REGION migrd  F  u32 id, u32 0, u64 gpa, u64 length, u64 offset in the file, u32 index,
                             u32 total: one of the regions of an incoming guest, in order
    39 LOAD_STATE  migrd  F  u64 length of the state in bytes
    40 DEPARTED    migrd     name migration_id
    41 THROTTLE    migrd     u32 percent, 0 to 99 (0: full speed)
    42 QUIT        migrd
    43 ASK_STATE   migrd

A name is 72 bytes, a text as many as stated: UTF-8, padded with NULs, at least one of them.
Serial: 0 in what a VMM says unasked and in WELCOME and ERROR; from 35 up, a number of the daemon's
choice, never 0, which ANSWER repeats.

What the words mean

    state    1 running    the guest executes here
             2 paused     it stands still here, by PAUSE; no thread writes guest memory
             3 incoming   empty: waits to be given a guest
             4 loaded     memory and state of a guest are here, it has not executed
             5 departed   it stands still, and was given away in `migration_id`
    features bit 0: throttle. Bit 1, of an incoming process: it has devices for the guest to come,
             and hands them over (nothing else) before it is welcomed. Unknown bits are ignored.
    kind     of a source: 1 process: fd of /proc/self/pagemap, addresses are virtual, and the VMM
             has registered them with a userfaultfd of its own (UFFD_FEATURE_WP_ASYNC, WP mode) that
             it keeps open; 2 iommufd page table: fd of /dev/iommu, object id the HWPT's, addresses
             are IOVA; 3 the device's own log (VFIO DMA logging): fd of the device, IOVA.
             of an event: 1 going away: the process ends soon, by its own will
    status   0 done; 1 refused: nothing was changed, `text` says why
    code     1 bad message, 2 bad hand-over, 3 version, 4 not allowed, 5 name taken, 6 too many,
             7 too slow. Unknown ones are to be shown with their text.
    instance MIGRD_INSTANCE of a process that migrd launched, else empty

A conversation

    VMM                                  migrd
     | HELLO                              |   within the hand-over deadline (10 s), all of it
     | REGION..., SOURCE..., DEVICE...    |   when `incoming` none of them; by feature bit 1
     | OFFER_END                          |   DEVICE... and OFFER_END
     |                            WELCOME |   or ERROR, and the end
     |                                    |
     |                    ask (serial 7)  |   asks may follow each other without waiting;
     | ANSWER (serial 7)                  |   the VMM answers each once, in order
     | EVENT                              |   at any time behind WELCOME

    An incoming process that was RESUMEd offers all it has: REGION... to OFFER_END, on the same
    connection, answered by WELCOME. From then on it is like any other.

    state      | may be asked (else: refused)                    | leads to
    -----------+-------------------------------------------------+----------------
    running    | PAUSE, THROTTLE; RESUME (nothing to do)         | paused
    paused     | SAVE_STATE, PAUSE (nothing to do), THROTTLE     |
               | RESUME                                          | running
               | DEPARTED                                        | departed
    incoming   | GIVE_REGION (each, in order), LOAD_STATE        | loaded
    loaded     | RESUME                                          | running
    departed   | DEPARTED of the same id (nothing to do)         |
               | RESUME (a rollback: the only way back)          | running
    any        | ASK_STATE, QUIT (the process ends, after its answer)

Rules of a VMM
1. PAUSE is answered when nothing of the guest writes its memory any more: not before. migrd waits
   5 s; who needs longer refuses before (our clients after 4 s), and the guest runs on at once.
2. `incoming` and `loaded` never execute one instruction of the guest before RESUME.
3. `departed` never executes again except after RESUME. Not even when the daemon is gone for good.
4. A lost connection changes no state. The VMM connects again, for ever, at most 1 s apart, and
   hands over anew: HELLO says where it stands. So a daemon that was restarted knows.
5. An ask is answered in the order of arrival, and refused rather than half done.
6. Opaque state travels as a memfd sealed with F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW, its file
   as long as `value` says: nobody can change it under the reader.
7. One process takes one guest in its life: a second hand-over into it is refused.

Rules of the daemon
1. Who connects is known from the kernel (SO_PEERCRED, a pidfd), never from what it says. Death is
   proven by the pidfd alone: a broken connection is only a broken connection.
2. A VM's name belongs to the living process that has it; another that claims it is refused. One
   that is `departed` does not hold its name: the guest may come back to a new process.
3. Every pair of gpa and length is checked before use: pages of 4096 bytes, no overlap, inside the
   file. Each page of each region must be watched by a process source; a write elsewhere would be
   lost. What is mapped at the addresses of a process source must be the region's file, MAP_SHARED
   and writable, at its offset: looked up in /proc/PID/maps, where the daemon may read it. What is
   wrong is answered with ERROR, which names field, value and cure.
4. Each ask has a deadline. What is answered behind it is dropped: whether it took effect is to be
   asked (ASK_STATE; answers come in order, so by then it had all the effect it will ever have).
   An answer to what was never asked, or a second one, ends the connection; the guest goes on.
5. Guest memory is only read and written (pread, pwrite, sendfile), never mapped: a file that a
   hostile VMM truncates gives a short read and a failed transfer, not a SIGBUS.

Versions: header and ERROR are the same in all versions. A daemon answers a message of another
version with ERROR 3, which names both, and hangs up; a client does not serve such a daemon.

Longer than other modules because the table above and the layouts below are to be read side by side.
"""

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any, ClassVar, Final, Self, TypeAlias

MAGIC: Final = 0x4452474D
"""The bytes "MGRD"."""
VERSION: Final = 1
PAGE_BYTES: Final = 4096

HEADER: Final = struct.Struct("<IHHII")
MOST_RANGES: Final = 1024
"""In one SOURCE; one that needs more is sent as several."""
MOST_PACKET_BYTES: Final = 64 << 10
MOST_THROTTLE_PERCENT: Final = 99
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a VM, an instance, a migration and a device may be called."""
_NAME_BYTES, _TEXT_BYTES, _ERROR_TEXT_BYTES = 72, 256, 512
_FORMATS: Final = {
    "u32": "I",
    "u64": "Q",
    "name": f"{_NAME_BYTES}s",
    "text": f"{_TEXT_BYTES}s",
    "long_text": f"{_ERROR_TEXT_BYTES}s",
}


class BadMessage(ValueError):
    """A packet that is none of this protocol; the text names field, value and cure."""


class BadVersion(BadMessage):
    """A packet of another version of the protocol."""


class MessageType(IntEnum):
    HELLO = 1
    REGION = 2
    SOURCE = 3
    DEVICE = 4
    OFFER_END = 5
    ANSWER = 6
    EVENT = 7
    WELCOME = 33
    ERROR = 34
    PAUSE = 35
    RESUME = 36
    SAVE_STATE = 37
    GIVE_REGION = 38
    LOAD_STATE = 39
    DEPARTED = 40
    THROTTLE = 41
    QUIT = 42
    ASK_STATE = 43


class ClientState(IntEnum):
    RUNNING = 1
    PAUSED = 2
    INCOMING = 3
    LOADED = 4
    DEPARTED = 5


class SourceKind(IntEnum):
    PROCESS = 1
    HWPT = 2
    DEVICE_LOG = 3


class EventKind(IntEnum):
    GOING_AWAY = 1


class Status(IntEnum):
    DONE = 0
    REFUSED = 1


class ErrorCode(IntEnum):
    BAD_MESSAGE = 1
    BAD_HANDOVER = 2
    VERSION = 3
    NOT_ALLOWED = 4
    NAME_TAKEN = 5
    TOO_MANY = 6
    TOO_SLOW = 7


class Features(IntFlag):
    THROTTLE = 1
    DEVICES = 2


class Message:
    """One kind of message: its number, and its body as `attribute:format` in wire order.

    An attribute `_` is a field that is 0. ENUMS says which attributes have a type of their own.
    """

    TYPE: ClassVar[MessageType]
    LAYOUT: ClassVar[str] = ""
    ENUMS: ClassVar[Mapping[str, type[IntEnum]]] = {}
    BODY: ClassVar[struct.Struct]

    def __init_subclass__(cls) -> None:
        formats = (_FORMATS[form] for _, form in cls._fields())
        cls.BODY = struct.Struct("<" + "".join(formats))

    @classmethod
    def _fields(cls) -> Iterator[tuple[str, str]]:
        for field in cls.LAYOUT.split():
            attribute, _, form = field.partition(":")
            yield attribute, form

    def pack(self) -> bytes:
        values = (
            0 if attribute == "_" else _to_wire(getattr(self, attribute), attribute, form)
            for attribute, form in self._fields()
        )
        return self.BODY.pack(*values)

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        if len(body) != cls.BODY.size:
            raise BadMessage(f"the body has {len(body)} bytes; it takes {cls.BODY.size}")
        return cls(**cls._values(body))

    @classmethod
    def _values(cls, body: bytes) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for (attribute, form), raw in zip(cls._fields(), cls.BODY.unpack_from(body), strict=True):
            if attribute == "_":
                if raw:
                    raise BadMessage(f"a field that must be 0 is {raw}")
            elif isinstance(raw, bytes):
                found[attribute] = _from_padded(raw, attribute, form)
            elif attribute in cls.ENUMS:
                found[attribute] = _member(cls.ENUMS[attribute], raw, attribute)
            else:
                found[attribute] = raw
        return found


@dataclass(frozen=True)
class Hello(Message):
    TYPE = MessageType.HELLO
    LAYOUT = "state:u32 features:u32 vm:name instance:name migration_id:name"
    ENUMS = {"state": ClientState}

    state: ClientState
    features: int
    """Bits of Features, and others that a later client may have."""
    vm: str
    instance: str = ""
    migration_id: str = ""


@dataclass(frozen=True)
class RegionMessage(Message):
    """A piece of guest memory; its file is the descriptor."""

    TYPE = MessageType.REGION
    LAYOUT = "id:u32 _:u32 gpa:u64 length_bytes:u64 offset_bytes:u64 hva:u64"

    id: int
    gpa: int
    length_bytes: int
    offset_bytes: int
    """Where it begins in the file."""
    hva: int
    """Where the VMM has it mapped; 0 where it is not told."""


@dataclass(frozen=True)
class RangeMessage:
    """A piece of a region, and the address under which the source knows it."""

    BODY: ClassVar = struct.Struct("<IIQQQ")

    region_id: int
    offset_bytes: int
    address: int
    length_bytes: int


@dataclass(frozen=True)
class SourceMessage(Message):
    TYPE = MessageType.SOURCE
    LAYOUT = "kind:u32 object_id:u32 page_size_bytes:u64 count:u32 _:u32"
    ENUMS = {"kind": SourceKind}

    kind: SourceKind
    object_id: int
    """Id of the HWPT; 0 for the other kinds."""
    page_size_bytes: int
    ranges: tuple[RangeMessage, ...]

    @property
    def count(self) -> int:
        return len(self.ranges)

    def pack(self) -> bytes:
        ranges = (
            RangeMessage.BODY.pack(r.region_id, 0, r.offset_bytes, r.address, r.length_bytes)
            for r in self.ranges
        )
        return super().pack() + b"".join(ranges)

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        if len(body) < cls.BODY.size:
            raise BadMessage(f"the body has {len(body)} bytes; it takes {cls.BODY.size} and more")
        values = cls._values(body)
        count, rest = values.pop("count"), body[cls.BODY.size :]
        if not 0 < count <= MOST_RANGES or len(rest) != count * RangeMessage.BODY.size:
            raise BadMessage(
                f"ranges is {count} and {len(rest)} bytes follow; send 1 to {MOST_RANGES} ranges "
                f"of {RangeMessage.BODY.size} bytes, and split a longer list"
            )
        ranges = []
        for region_id, zero, *place in RangeMessage.BODY.iter_unpack(rest):
            if zero:
                raise BadMessage(f"a field of a range that must be 0 is {zero}")
            ranges.append(RangeMessage(region_id, *place))
        return cls(**values, ranges=tuple(ranges))


@dataclass(frozen=True)
class DeviceMessage(Message):
    TYPE = MessageType.DEVICE
    LAYOUT = "id:name"

    id: str


@dataclass(frozen=True)
class OfferEnd(Message):
    TYPE = MessageType.OFFER_END
    LAYOUT = "regions:u32 sources:u32 devices:u32 _:u32"

    regions: int
    sources: int
    devices: int


@dataclass(frozen=True)
class Answer(Message):
    TYPE = MessageType.ANSWER
    LAYOUT = "status:u32 state:u32 value:u64 migration_id:name text:text"
    ENUMS = {"status": Status, "state": ClientState}

    status: Status
    state: ClientState
    """Where the VMM stands behind this answer."""
    value: int = 0
    migration_id: str = ""
    text: str = ""


@dataclass(frozen=True)
class Event(Message):
    TYPE = MessageType.EVENT
    LAYOUT = "kind:u32 text:text"
    ENUMS = {"kind": EventKind}

    kind: EventKind
    text: str = ""


@dataclass(frozen=True)
class Welcome(Message):
    TYPE = MessageType.WELCOME
    LAYOUT = "most_state_bytes:u64"

    most_state_bytes: int


@dataclass(frozen=True)
class ErrorMessage(Message):
    TYPE = MessageType.ERROR
    LAYOUT = "code:u32 text:long_text"

    code: int
    """An ErrorCode, or one of a later version."""
    text: str


class Ask(Message):
    """What migrd asks of a VMM."""


@dataclass(frozen=True)
class Pause(Ask):
    TYPE = MessageType.PAUSE


@dataclass(frozen=True)
class Resume(Ask):
    TYPE = MessageType.RESUME


@dataclass(frozen=True)
class SaveState(Ask):
    TYPE = MessageType.SAVE_STATE


@dataclass(frozen=True)
class GiveRegion(Ask):
    TYPE = MessageType.GIVE_REGION
    LAYOUT = "id:u32 _:u32 gpa:u64 length_bytes:u64 offset_bytes:u64 index:u32 total:u32"

    id: int
    gpa: int
    length_bytes: int
    offset_bytes: int
    index: int
    total: int


@dataclass(frozen=True)
class LoadState(Ask):
    TYPE = MessageType.LOAD_STATE
    LAYOUT = "length_bytes:u64"

    length_bytes: int


@dataclass(frozen=True)
class Departed(Ask):
    TYPE = MessageType.DEPARTED
    LAYOUT = "migration_id:name"

    migration_id: str


@dataclass(frozen=True)
class Throttle(Ask):
    TYPE = MessageType.THROTTLE
    LAYOUT = "percent:u32"

    percent: int


@dataclass(frozen=True)
class Quit(Ask):
    TYPE = MessageType.QUIT


@dataclass(frozen=True)
class AskState(Ask):
    TYPE = MessageType.ASK_STATE


Kind: TypeAlias = type[Message]
_KINDS: Final[tuple[Kind, ...]] = (
    *(Hello, RegionMessage, SourceMessage, DeviceMessage, OfferEnd, Answer, Event),
    *(Welcome, ErrorMessage, Pause, Resume, SaveState, GiveRegion, LoadState),
    *(Departed, Throttle, Quit, AskState),
)
KIND_OF: Final[Mapping[int, Kind]] = {int(kind.TYPE): kind for kind in _KINDS}
WITH_FD: Final[frozenset[Kind]] = frozenset(
    {RegionMessage, SourceMessage, DeviceMessage, GiveRegion, LoadState}
)
"""These always carry one descriptor; ANSWER one when it answers SAVE_STATE with DONE; else none."""


@dataclass(frozen=True)
class Packet:
    """One message as it came."""

    serial: int
    message: Message


def encode(message: Message, serial: int = 0, *, version: int = VERSION) -> bytes:
    """The packet of a message. Raises BadMessage when a value does not fit its field."""
    try:
        body = message.pack()
    except struct.error as failure:
        raise BadMessage(f"{message.TYPE.name}: {failure}") from None
    return HEADER.pack(MAGIC, message.TYPE, version, len(body), serial) + body


def decode(packet: bytes) -> Packet:
    """The message in a packet. Raises BadVersion, BadMessage."""
    if len(packet) < HEADER.size:
        raise BadMessage(f"a packet of {len(packet)} bytes has no header; it takes {HEADER.size}")
    magic, type_, version, length, serial = HEADER.unpack_from(packet)
    if magic != MAGIC:
        raise BadMessage(f"magic is {magic:#x}, not {MAGIC:#x}: this is another protocol")
    body = packet[HEADER.size :]
    if version != VERSION and type_ != MessageType.ERROR:
        raise BadVersion(
            f"this message is of version {version} of the hand-over protocol, and this side speaks "
            f"version {VERSION}; upgrade the older of the two"
        )
    if length != len(body):
        raise BadMessage(f"length is {length}, and {len(body)} bytes follow the header")
    kind = KIND_OF.get(type_)
    if kind is None:
        raise BadMessage(f"type {type_} is no message of version {VERSION}")
    try:
        return Packet(serial, kind.unpack(body))
    except BadMessage as failure:
        raise BadMessage(f"{kind.TYPE.name}: {failure}") from None


def printable(text: str) -> str:
    """Somebody else's text, fit for a log line or a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _to_wire(value: Any, attribute: str, form: str) -> Any:
    if not isinstance(value, str):
        return value
    raw = value.encode("utf-8", "replace")
    if form == "name":
        if len(raw) >= _NAME_BYTES or b"\0" in raw:
            raise BadMessage(f"{attribute} is {value!r}: less than {_NAME_BYTES} bytes, no NUL")
        return raw
    room = (_TEXT_BYTES if form == "text" else _ERROR_TEXT_BYTES) - 1
    return raw.replace(b"\0", b"?")[:room].decode("utf-8", "ignore").encode()


def _from_padded(raw: bytes, attribute: str, form: str) -> str:
    text, nul, padding = raw.partition(b"\0")
    if not nul or padding.strip(b"\0"):
        raise BadMessage(f"{attribute} is not UTF-8 text, padded with NULs")
    try:
        decoded = text.decode()
    except UnicodeDecodeError:
        raise BadMessage(f"{attribute} is {text[:64]!r}, which is not UTF-8") from None
    if form == "name" and decoded and not NAME.fullmatch(decoded):
        raise BadMessage(
            f"{attribute} is {printable(decoded)!r}; take 1 to 64 letters, digits and . _ - with a "
            "letter or digit in front"
        )
    return decoded


def _member(kind: type[IntEnum], value: int, attribute: str) -> IntEnum:
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(f"{member} ({member.name.lower()})" for member in kind)
        raise BadMessage(f"{attribute} is {value}, which is none of {known}") from None
