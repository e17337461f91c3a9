"""A device's data while it is saved or loaded: the data fd of one session.

    PRE_COPY, PRE_COPY_P2P, STOP_COPY  ── one session ──►  read      the bytes are opaque, and in
    RESUMING                           ── one session ──►  write     the order they came

Traps
- At the end of what there is in PRE_COPY, the header promises ENOMSG from read(); some drivers
  return nothing instead. Both are b"" here.
- A session ends with the state it belongs to: its descriptor then answers ENODEV and stays to be
  closed.

Source: linux/vfio.h.
"""

import errno
from dataclasses import dataclass
from typing import Final

from migrd.abi import vfio as abi
from migrd.errors import KernelGone, KernelRejected
from migrd.kernel.calls import Meaning, Verb, call, kernel_error
from migrd.kernel.vfio_calls import Descriptor

_LARGEST_READ_BYTES = 1 << 20

_SESSION_OVER = Meaning(KernelGone, "session_ended", "the device left the state it was opened in")
PRECOPY_INFO: Final = Verb(
    "VFIO_MIG_GET_PRECOPY_INFO",
    abi.VFIO_MIG_GET_PRECOPY_INFO,
    {
        errno.EINVAL: Meaning(KernelRejected, "not_in_precopy", "the device is not in PRE_COPY"),
        errno.ENODEV: _SESSION_OVER,
    },
)
# A descriptor that is closed is never used (Descriptor.fd): EBADF is the wrong direction.
READ: Final = {
    errno.ENODEV: _SESSION_OVER,
    errno.EBADF: Meaning(
        KernelRejected, "wrong_direction", "the device is being loaded, not saved"
    ),
}
WRITE: Final = {
    errno.ENODEV: _SESSION_OVER,
    errno.EBADF: Meaning(
        KernelRejected, "wrong_direction", "the device is being saved, not loaded"
    ),
    errno.EFAULT: Meaning(
        KernelRejected, "device_data_rejected", "it was saved from another kind of device"
    ),
    errno.ENOMEM: Meaning(
        KernelRejected, "device_data_too_long", "it is more than the device can take"
    ),
}


@dataclass(frozen=True)
class PrecopyLeft:
    """What a device still has to send in PRE_COPY, by its own estimate."""

    initial_bytes: int
    dirty_bytes: int


class DataStream(Descriptor):
    """The data fd of one session: read it while saving, write it while loading."""

    def read(self, max_bytes: int = _LARGEST_READ_BYTES) -> bytes:
        """The next of the device's data. b"": in STOP_COPY the end, in PRE_COPY nothing for now.

        Raises KernelGone when the session is over.
        """
        try:
            return self._system.read(self.fd, min(max_bytes, _LARGEST_READ_BYTES))
        except OSError as cause:
            if cause.errno == errno.ENOMSG:
                return b""
            raise kernel_error(cause, f"read the data of {self.name}", READ, "read") from cause

    def write(self, data: bytes) -> None:
        """All of `data`, at whatever pace the device takes it.

        Raises KernelRejected when it is not this device's data; what it holds then is undefined
        and only a reset helps.
        """
        left = memoryview(data)
        while left:
            try:
                written = self._system.write(self.fd, left)
            except OSError as cause:
                subject = f"load data into {self.name}"
                raise kernel_error(cause, subject, WRITE, "write") from cause
            left = left[written:]

    def precopy_left(self) -> PrecopyLeft:
        """Raises KernelRejected outside PRE_COPY, KernelGone when the session is over."""
        left = abi.vfio_precopy_info()
        call(
            self._system.ioctl,
            self.fd,
            PRECOPY_INFO,
            left,
            f"ask what {self.name} has left to send",
        )
        return PrecopyLeft(left.initial_bytes, left.dirty_bytes)
