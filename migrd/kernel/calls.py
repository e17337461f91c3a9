"""The one place that makes an ioctl, and the one way from errno to an error.

    adapter -- Verb (number + table of errnos) --> call() -- Ioctl --> kernel or simulator
                                                     |
                                     errno -> table -> KernelError, __cause__ is the OSError

Rules:
1. One table per call: the same errno means different things in different calls. What a call's own
   table lacks is taken from COMMON; what both lack is a plain KernelError.
2. Calls block. The caller runs them in a worker thread (`engine.threads.in_thread`).
3. A call that a signal interrupted is made again (PEP 475 leaves ioctls out). All calls made here
   may be repeated: what they read is ORed into a buffer or overwritten.

Traps:
- `fcntl.ioctl` lets other threads run only for arguments of up to 1024 bytes; a larger one would
  stop the event loop for as long as the kernel takes. Larger ones are refused here: give the
  kernel a pointer instead.
- Python prints EOPNOTSUPP as ENOTSUP (both 95 on Linux): compare numbers, never names.
"""

import ctypes
import errno
import fcntl
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Protocol

from migrd.abi.ioctl import UapiStruct
from migrd.errors import (
    KernelBusy,
    KernelDenied,
    KernelError,
    KernelGone,
    KernelRejected,
    KernelTooOld,
    KernelUnsupported,
)

Argument = UapiStruct | bytearray | int
_LARGEST_ARGUMENT_BYTES = 1024


class Ioctl(Protocol):
    """ioctl(2): the seam between adapters and the kernel. Raises OSError."""

    def __call__(self, fd: int, request: int, argument: Argument, /) -> int: ...


def system_ioctl(fd: int, request: int, argument: Argument, /) -> int:
    """The kernel's. What it writes to `argument` is there afterwards, after an error too."""
    if isinstance(argument, int):
        size_bytes = 0
    elif isinstance(argument, bytearray):
        size_bytes = len(argument)
    else:
        size_bytes = ctypes.sizeof(argument)
    if size_bytes > _LARGEST_ARGUMENT_BYTES:
        raise ValueError(f"ioctl argument of {size_bytes} bytes would be made with the GIL held")
    while True:
        try:
            return fcntl.ioctl(fd, request, argument, True)
        except InterruptedError:
            continue


@dataclass(frozen=True)
class Meaning:
    """What an errno of one call means."""

    error: type[KernelError]
    code: str
    cure: str
    """For people: why, and what to do; the end of "cannot <subject>: ..."."""


@dataclass(frozen=True)
class Verb:
    """One ioctl: its header's name, its number, and its own errnos."""

    name: str
    number: int
    meanings: Mapping[int, Meaning] = field(default_factory=dict)


COMMON: Final[Mapping[int, Meaning]] = MappingProxyType(
    {
        errno.ENOTTY: Meaning(
            KernelTooOld, "ioctl_unknown", "this kernel does not know the call: upgrade it"
        ),
        errno.E2BIG: Meaning(
            KernelTooOld,
            "ioctl_too_new",
            "this kernel knows an older form of the call: upgrade it",
        ),
        errno.EOPNOTSUPP: Meaning(
            KernelUnsupported,
            "not_supported",
            "this kernel, IOMMU or driver does not support it",
        ),
        errno.EPERM: Meaning(KernelDenied, "not_permitted", "not permitted: run migrd as root"),
        errno.EACCES: Meaning(KernelDenied, "not_permitted", "not permitted: run migrd as root"),
        errno.ENOENT: Meaning(
            KernelGone, "object_gone", "there is no such object, or it is of another kind"
        ),
        errno.ENODEV: Meaning(KernelGone, "device_gone", "the device is gone"),
        errno.EBADF: Meaning(KernelGone, "descriptor_closed", "its descriptor has been closed"),
        errno.EBUSY: Meaning(KernelBusy, "object_busy", "it is in use"),
        errno.ENOMEM: Meaning(
            KernelBusy, "out_of_memory", "the kernel has no memory for it, or a limit is reached"
        ),
        errno.EINVAL: Meaning(
            KernelRejected, "arguments_rejected", "the kernel does not accept the arguments"
        ),
        errno.EFAULT: Meaning(
            KernelRejected, "bad_address", "an address given is not mapped in this process"
        ),
        errno.EOVERFLOW: Meaning(
            KernelRejected, "range_overflows", "the range reaches beyond the address space"
        ),
    }
)


def call(ioctl: Ioctl, fd: int, verb: Verb, argument: Argument, subject: str) -> int:
    """Make one ioctl. `subject` completes "cannot ..." and names the object and the values.

    Raises the KernelError that the verb's table, else COMMON, gives for the errno; its `errno` is
    the number and its `__cause__` the OSError.
    """
    try:
        return ioctl(fd, verb.number, argument)
    except OSError as cause:
        raise kernel_error(cause, subject, verb.meanings, verb.name) from cause


def kernel_error(
    cause: OSError, subject: str, meanings: Mapping[int, Meaning], name: str
) -> KernelError:
    """The error for `cause`; for calls other than ioctls (open, read, pidfd_getfd) too."""
    number = cause.errno or 0
    meaning = meanings.get(number) or COMMON.get(number)
    symbol = errno.errorcode.get(number, str(number))
    told = f"{name}: {symbol}, {os.strerror(number)}"
    if meaning is None:
        return KernelError(f"cannot {subject} ({told})", errno=number)
    return meaning.error(
        f"cannot {subject}: {meaning.cure} ({told})", errno=number, code=meaning.code
    )
