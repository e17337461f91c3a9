"""Answers about hardware and IOVA ranges that no simulator here gives: old, new, and wrong ones."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from migrd.abi import iommufd as abi
from migrd.errors import KernelError
from migrd.kernel.calls import Argument
from migrd.kernel.hw_info import HwInfo
from migrd.kernel.iommufd import Iommufd

PAGE = 4096


def with_answer(answer: Callable[[Any], None]) -> Iterator[Iommufd]:
    def ioctl(fd: int, request: int, argument: Argument, /) -> int:
        answer(argument)
        return 0

    with Iommufd(os.open("/dev/null", os.O_RDONLY), ioctl) as iommufd:
        yield iommufd


def asked_of_hardware(kind: int, capabilities: int, registers: bytes, length: int) -> HwInfo:
    def answer(argument: Any) -> None:
        argument.out_data_type = kind
        argument.out_capabilities = capabilities
        ctypes.memmove(argument.data_uptr, registers, len(registers))
        argument.data_len = length

    [said] = [iommufd.hw_info(1) for iommufd in with_answer(answer)]
    return said


def vtd(cap: int, ecap: int) -> bytes:
    return bytes(abi.iommu_hw_info_vtd(flags=1, cap_reg=cap, ecap_reg=ecap))


def test_the_registers_of_a_vtd_are_decoded() -> None:
    said = asked_of_hardware(1, 0, vtd(0xD2008C222F0606, 0x480080F00F4A), 24)  # as QEMU 10 has them
    assert said.vtd is not None
    assert said.vtd.address_width_bits == 48
    assert said.vtd.has_scalable_mode
    assert not said.vtd.has_dirty_bits
    assert said.vtd.flags.value == 1
    assert not said.tracks_dirty
    tracking = asked_of_hardware(1, 1, vtd(0xD2008C222F0606, 1 << 45 | 1 << 43 | 1 << 26), 24)
    assert tracking.tracks_dirty
    assert tracking.vtd is not None
    assert tracking.vtd.has_dirty_bits
    assert tracking.vtd.has_nesting


def test_an_iommu_of_an_unknown_kind_with_unknown_capabilities_is_kept_as_it_is() -> None:
    said = asked_of_hardware(77, 0x8000_0000_0000_0009, b"\1\2\3", 3)
    assert (said.hardware_type, said.registers, said.vtd) == (77, b"\1\2\3", None)
    assert said.tracks_dirty
    assert said.unknown_capability_bits == 0x8000_0000_0000_0008


@pytest.mark.parametrize("length", [0, 8, 1 << 31])
def test_registers_that_are_cut_short_or_too_long_do_no_harm(length: int) -> None:
    said = asked_of_hardware(1, 1, vtd(0, 0), length)
    assert (said.vtd is None) == (length < 24)


def answer_ranges(count: int, claimed: int | None = None) -> Callable[[Any], None]:
    def answer(argument: Any) -> None:
        room, argument.num_iovas = argument.num_iovas, claimed or count
        if room < argument.num_iovas:
            raise OSError(errno.EMSGSIZE, "too many")
        for number in range(count):
            entry = abi.iommu_iova_range(start=number * 2 * PAGE, last=number * 2 * PAGE + PAGE - 1)
            size = ctypes.sizeof(entry)
            ctypes.memmove(argument.allowed_iovas + number * size, bytes(entry), size)

    return answer


def test_any_number_of_iova_ranges_is_read() -> None:
    for count in (0, 1, 64, 65, 1000):
        for iommufd in with_answer(answer_ranges(count)):
            ranges = iommufd.foreign_ioas(1).iova_ranges().ranges
            assert len(ranges) == count
            assert ranges[-1:] == () or ranges[-1].first == (count - 1) * 2 * PAGE


def test_a_kernel_that_claims_endless_ranges_is_not_believed() -> None:
    for iommufd in with_answer(answer_ranges(0, claimed=(1 << 32) - 1)):
        with pytest.raises(KernelError, match="EMSGSIZE"):
            iommufd.foreign_ioas(1).iova_ranges()
