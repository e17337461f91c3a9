"""A device's data on its way, so that the other side sees what is missing, twice, or out of order.

    frame   u64 offset · u32 kind (1 data, 2 end) · u32 zero · the bytes     little-endian

`offset` counts the bytes of this device before the frame; the end has none, and its offset is the
total. A frame is at most 1 MiB, as the stream between the hosts has it. What the bytes mean is the
device's: PRE_COPY and STOP_COPY are one stream.
"""

import struct
from typing import Final

from migrd.errors import DeviceRefused

_HEADER: Final = struct.Struct("<QII")
LARGEST_CHUNK_BYTES: Final = (1 << 20) - _HEADER.size
_BYTES, _END = 1, 2


class FrameWriter:
    """Of one device."""

    def __init__(self) -> None:
        self.sent_bytes = 0

    def pack(self, chunk: bytes) -> bytes:
        frame = _HEADER.pack(self.sent_bytes, _BYTES, 0) + chunk
        self.sent_bytes += len(chunk)
        return frame

    def end(self) -> bytes:
        return _HEADER.pack(self.sent_bytes, _END, 0)


class FrameReader:
    """Of one device. `name` is for messages."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.taken_bytes = 0
        self.has_ended = False

    def unpack(self, frame: bytes) -> bytes:
        """The bytes in it; b"" at the end. Raises DeviceRefused for anything but the next frame."""
        if not _HEADER.size <= len(frame) <= _HEADER.size + LARGEST_CHUNK_BYTES:
            raise self._refused(f"a frame of {len(frame)} bytes")
        offset, kind, zero = _HEADER.unpack_from(frame)
        chunk = frame[_HEADER.size :]
        if self.has_ended:
            raise self._refused(f"more data after its end at {self.taken_bytes} bytes")
        if kind not in (_BYTES, _END) or zero or (kind == _END) == bool(chunk):
            raise self._refused(f"a frame of kind {kind} with {len(chunk)} bytes")
        if offset != self.taken_bytes:
            raise self._refused(f"data at byte {offset}, where byte {self.taken_bytes} is due")
        self.taken_bytes += len(chunk)
        self.has_ended = kind == _END
        return chunk

    def _refused(self, what: str) -> DeviceRefused:
        return DeviceRefused(f"{self._name}: {what} came for it", code="device_data_out_of_order")
