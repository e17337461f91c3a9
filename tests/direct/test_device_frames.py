"""Who takes a device's data sees what is missing, twice, out of order or not a frame at all."""

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrd.direct.device_frames import LARGEST_CHUNK_BYTES, FrameReader, FrameWriter
from migrd.errors import DeviceRefused


def frames_of(chunks: list[bytes]) -> list[bytes]:
    writer = FrameWriter()
    return [*map(writer.pack, chunks), writer.end()]


def taken(frames: list[bytes]) -> tuple[bytes, bool]:
    reader = FrameReader("device net0")
    return b"".join(map(reader.unpack, frames)), reader.has_ended


@given(st.lists(st.binary(min_size=1, max_size=64), max_size=8))
def test_what_was_packed_is_what_is_taken(chunks: list[bytes]) -> None:
    assert taken(frames_of(chunks)) == (b"".join(chunks), True)
    assert not taken(frames_of(chunks)[:-1])[1]


def test_no_other_order_is_taken() -> None:
    frames = frames_of([b"ab", b"cde", b"f"])
    for order in permutations(frames):
        if list(order) != frames:
            with pytest.raises(DeviceRefused, match="net0"):
                taken(list(order))


@pytest.mark.parametrize("repeated", range(4))
def test_no_frame_is_taken_twice(repeated: int) -> None:
    frames = frames_of([b"ab", b"cde", b"f"])
    with pytest.raises(DeviceRefused):
        taken([*frames[: repeated + 1], *frames[repeated:]])


def test_nothing_is_taken_after_the_end() -> None:
    writer = FrameWriter()
    frames = [writer.pack(b"ab"), writer.end(), writer.pack(b"c")]
    with pytest.raises(DeviceRefused, match="after its end"):
        taken(frames)


@given(st.binary(max_size=80))
def test_garbage_is_refused_and_nothing_else_is_raised(garbage: bytes) -> None:
    try:
        taken([garbage])
    except DeviceRefused:
        return
    assert garbage[:8] == bytes(8), "it was a frame by chance"


def test_a_frame_is_no_larger_than_a_record_between_the_hosts() -> None:
    assert len(FrameWriter().pack(bytes(LARGEST_CHUNK_BYTES))) == 1 << 20
    with pytest.raises(DeviceRefused):
        taken([FrameWriter().pack(bytes(LARGEST_CHUNK_BYTES + 1))])
