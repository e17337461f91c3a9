"""What the mirrors of kernel headers are made of: fixed-width fields, structs, flags, numbers.

A module of migrd.abi mirrors headers: the kernel's names, order and case, no calls. It says which
in HEADERS, and the C compiler checks everything in it against them (tests/abi), by these rules:

    module attribute in upper case, an int    a macro or enum value of that very name
    subclass of UapiStruct                    `struct <name>`: size, and offset and size per field
    subclass of UapiEnum or UapiFlag          member X is the header's <prefix>X

Traps that the classes here close, both of ctypes:
1. A misspelt field in Structure(**fields) becomes an attribute of the object and is lost.
2. An int too large for its field is cut without a word: 2**32 as a length is 0.
One that stays, of enum: `~flag` has only the bits that have names. To mask, take `~flag.value`.
"""

import ctypes
from enum import IntEnum, IntFlag
from typing import Any, ClassVar, TypeAlias

u8 = ctypes.c_uint8
u16 = ctypes.c_uint16
u32 = ctypes.c_uint32
u64 = ctypes.c_uint64
s32 = ctypes.c_int32
s64 = ctypes.c_int64

_NR_BITS, _TYPE_BITS, _SIZE_BITS = 8, 8, 14
_WRITE, _READ = 1, 2
_Sized: TypeAlias = "type[ctypes.Structure | ctypes._SimpleCData[Any]]"


class UapiStruct(ctypes.Structure):
    """A struct of a header. A leading `size` or `argsz` is filled in unless it is given."""

    def __init__(self, **fields: Any) -> None:
        leading = self._fields_[0][0]
        if leading in {"size", "argsz"}:
            fields.setdefault(leading, ctypes.sizeof(self))
        super().__init__(**fields)

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises AttributeError for a field that is not there, OverflowError for a value that
        does not fit."""
        if not hasattr(type(self), name):
            raise AttributeError(f"struct {type(self).__name__} has no field {name}")
        super().__setattr__(name, value)
        if isinstance(value, int) and getattr(self, name) != value:
            raise OverflowError(f"{type(self).__name__}.{name} cannot hold {value:#x}")


class UapiEnum(IntEnum):
    """An enum of a header; member X mirrors `<prefix>X`."""

    __header_prefix__: ClassVar[str]

    def __init_subclass__(cls, *, prefix: str) -> None:
        super().__init_subclass__()
        cls.__header_prefix__ = prefix


class UapiFlag(IntFlag):
    """Bits of a header; member X mirrors `<prefix>X`. Unknown bits are kept."""

    __header_prefix__: ClassVar[str]

    def __init_subclass__(cls, *, prefix: str) -> None:
        super().__init_subclass__()
        cls.__header_prefix__ = prefix


def io(kind: int, number: int) -> int:
    """_IO(): no direction and no size in the number."""
    return kind << _NR_BITS | number


def ior(kind: int, number: int, argument: _Sized) -> int:
    """_IOR(): the kernel writes to `argument`."""
    return _with_size(_READ, kind, number, argument)


def iow(kind: int, number: int, argument: _Sized) -> int:
    """_IOW(): the kernel reads `argument`."""
    return _with_size(_WRITE, kind, number, argument)


def iowr(kind: int, number: int, argument: _Sized) -> int:
    """_IOWR(): the kernel reads and writes `argument`."""
    return _with_size(_READ | _WRITE, kind, number, argument)


def _with_size(direction: int, kind: int, number: int, argument: _Sized) -> int:
    size_shift = _NR_BITS + _TYPE_BITS
    direction_shift = size_shift + _SIZE_BITS
    return direction << direction_shift | ctypes.sizeof(argument) << size_shift | io(kind, number)
