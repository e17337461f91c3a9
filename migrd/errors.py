"""Every error that migrd raises on purpose, as one tree.

    MigrdError               something asked of migrd did not happen; `code` says what
    ├── ConfigError          the configuration cannot be used; names the key, the value, the cure
    ├── RequestError         the client can mend it
    │   ├── Invalid          the request itself is wrong; carries every violation at once
    │   ├── NotFound         no such VM, migration, peer or profile
    │   ├── Conflict         right in itself, not possible in the present state
    │   │   └── Refused      a decision says no: every reason at once, and nothing was touched
    │   ├── NotAuthorized    known to nobody, or not allowed
    │   └── TooLarge         more bytes or deeper nesting than the limit
    ├── Unavailable          not now; the same request may work later
    ├── VmmError             about a QEMU process
    │   ├── VmmRefused       QEMU answered with an error: the command had no effect
    │   ├── VmmTimedOut      no answer in time: NOT known whether the command took effect
    │   ├── VmmUnreachable   no connection: nothing is known about the process
    │   └── VmmDied          the process is proven dead (it was seen to exit)
    ├── PeerError            about another host's migrd
    │   ├── PeerRefused      it answered with a problem
    │   ├── PeerTimedOut     no answer: NOT known whether the message took effect
    │   ├── PeerUnreachable  no connection was made: the message was not delivered
    │   ├── StreamError      the memory stream broke, stalled or was ended: move the memory anew
    │   └── ReceiveError     what it sends cannot be right: nothing of it is kept
    ├── KernelError          a system call on /dev/iommu, a VFIO device or sysfs failed; has `errno`
    │   ├── KernelTooOld     it does not know the call (or has no /dev/iommu at all): upgrade
    │   ├── KernelUnsupported  it knows the call, this hardware or driver cannot: do without
    │   ├── KernelDenied     not permitted: grant it, or make the host safe for it
    │   ├── KernelGone       the object named is not there (any more): look again
    │   ├── KernelBusy       in use by somebody: free it first
    │   ├── KernelRejected   the arguments do not fit what is there: a fact assumed is not true
    │   └── LogLost          what was written since the last read is not known: take all for dirty
    ├── DeviceError          of a device whose state moves with its guest; where it stands is said
    │   ├── DeviceTimedOut   the kernel does not answer: NOT known what came of it; the call goes on
    │   ├── DeviceNeedsReset no way leads from where it stands but a reset, which loses its state
    │   └── DeviceRefused    it cannot do this, or what arrived is not its own: nothing was changed
    ├── ArbiterError         about the third party that says who may run a VM
    │   ├── ArbiterUnavailable  no answer: NOT known whether a write took effect: read again
    │   └── ArbiterConflict  the record is not what the write was decided on: nothing was changed
    └── JournalError         the journal cannot be written or read: no step may be taken on it

What the caller can do is in the class; what happened is in `code` (stable, snake_case) and the
message (for people: names the thing, the value and the cure). Knows no HTTP: `api.problems` maps
classes to status codes, exhaustively.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Violation:
    """One thing that is wrong with a request."""

    field: str
    """Path of the field in the request (`policy.max_throttle_percent`), or "" for the whole."""
    code: str
    message: str
    """For people: the value found, and what would be right."""


class MigrdError(Exception):
    """Base of all errors that migrd raises on purpose."""

    code = "error"
    retryable = False

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code


class ConfigError(MigrdError):
    code = "bad_configuration"


class RequestError(MigrdError):
    code = "bad_request"


class Invalid(RequestError):
    """The request is wrong in itself; all violations at once."""

    code = "invalid"

    def __init__(
        self, message: str, violations: Sequence[Violation] = (), *, code: str | None = None
    ) -> None:
        super().__init__(message, code=code)
        self.violations = tuple(violations)


class NotFound(RequestError):
    code = "not_found"


class Conflict(RequestError):
    code = "conflict"


class Refused(Conflict):
    """A decision says no; every reason at once, and nothing was touched."""

    code = "refused"

    def __init__(
        self, message: str, violations: Sequence[Violation] = (), *, code: str | None = None
    ) -> None:
        super().__init__(message, code=code)
        self.violations = tuple(violations)


class NotAuthorized(RequestError):
    code = "not_authorized"


class TooLarge(RequestError):
    code = "too_large"


class Unavailable(MigrdError):
    code = "unavailable"
    retryable = True


class VmmError(MigrdError):
    code = "vmm_error"


class VmmRefused(VmmError):
    """QEMU answered with an error; the command had no effect."""

    code = "vmm_refused"


class VmmTimedOut(VmmError):
    """No answer in time. It is not known whether the command took effect: ask."""

    code = "vmm_timed_out"
    retryable = True


class VmmUnreachable(VmmError):
    """No connection. Nothing is known about the process."""

    code = "vmm_unreachable"
    retryable = True


class VmmDied(VmmError):
    """The process is proven dead: its exit was observed, or its pid is gone or reused."""

    code = "vmm_died"


class PeerError(MigrdError):
    code = "peer_error"


class PeerRefused(PeerError):
    """The other migrd answered with a problem; `code` is the problem's code."""

    code = "peer_refused"


class PeerTimedOut(PeerError):
    """The message may or may not have arrived and taken effect: ask again."""

    code = "peer_timed_out"
    retryable = True


class PeerUnreachable(PeerError):
    """No connection could be made: the message was certainly not delivered."""

    code = "peer_unreachable"
    retryable = True


class StreamError(PeerError):
    """The memory stream between two hosts broke, stalled or ended; nothing half-moved counts."""

    code = "stream_broken"
    retryable = True


class ReceiveError(PeerError):
    """What the other host sends cannot be right; the transfer has ended, nothing of it is kept."""

    code = "bad_stream"


class KernelError(MigrdError):
    """A call to the kernel failed; `errno` is its number (0: none was given)."""

    code = "kernel_error"

    def __init__(self, message: str, *, errno: int = 0, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.errno = errno


class KernelTooOld(KernelError):
    """The kernel does not know this call, or was built without it."""

    code = "kernel_too_old"


class KernelUnsupported(KernelError):
    """The kernel knows the call; this IOMMU, device or driver cannot do it."""

    code = "kernel_unsupported"


class KernelDenied(KernelError):
    """Not permitted: a missing permission, or a host that is not safe for passthrough."""

    code = "kernel_denied"


class KernelGone(KernelError):
    """The object named is not there, or is of another kind."""

    code = "kernel_gone"


class KernelBusy(KernelError):
    """In use: by another owner, or by objects that depend on it."""

    code = "kernel_busy"
    retryable = True


class KernelRejected(KernelError):
    """The kernel refuses the arguments: something assumed about the object is not true."""

    code = "kernel_rejected"


class LogLost(KernelError):
    """A log of dirty pages has ended or has a hole: what was written since its last read is not
    known. Nothing but all of its pages may be taken for dirty."""

    code = "dirty_log_lost"


class DeviceError(MigrdError):
    """A device of the guest could not be brought where it was to go; the message says where it is.

    The cause is the KernelError, where the kernel gave one.
    """

    code = "device_error"


class DeviceTimedOut(DeviceError):
    """The kernel has not answered. The call cannot be ended and goes on: ask the device again."""

    code = "device_timed_out"
    retryable = True


class DeviceNeedsReset(DeviceError):
    """Only a reset helps the device, and that loses the state that the guest had in it."""

    code = "device_needs_reset"


class DeviceRefused(DeviceError):
    """The device cannot do it, or what came for it is not its own, or not in order."""

    code = "device_refused"


class ArbiterError(MigrdError):
    code = "arbiter_error"


class ArbiterUnavailable(ArbiterError):
    """No answer in time. It is not known whether a write took effect: read again."""

    code = "arbiter_unavailable"
    retryable = True


class ArbiterConflict(ArbiterError):
    """The record is not what the write was decided on; nothing was changed."""

    code = "arbiter_conflict"


class JournalError(MigrdError):
    """The journal could not be written. The intent is not durable: do not act on it."""

    code = "journal_failed"
    retryable = True
