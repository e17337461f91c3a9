"""Guest memory in huge pages, of which this machine need not have any: what is asked about them."""

from __future__ import annotations

import ctypes
import mmap
import os
from types import SimpleNamespace

import pytest

from migrd.direct.descriptors import DescriptorKinds
from migrd.direct.offer import OfferBuilder, OfferLimits
from migrd.errors import Invalid
from tests.direct.raw_client import MIB, memory, offer, page_map

KINDS = DescriptorKinds()
REGION, SOURCE, END = offer(4 * MIB)


def in_pages_of(size_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file on hugetlbfs says."""
    monkeypatch.setattr(os, "fstatvfs", lambda fd: SimpleNamespace(f_bsize=size_bytes))


def test_memory_in_small_pages_is_said_to_be() -> None:
    with memory() as fd:
        assert KINDS.memory(fd, "region 0", 0, MIB).page_bytes == 4096


def test_pages_in_which_no_writes_are_found_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    in_pages_of(1 << 30, monkeypatch)
    with memory() as fd, pytest.raises(Invalid, match=r"1024 MiB.* up to 2 MiB"):
        KINDS.memory(fd, "region 0", 0, MIB)


def test_a_page_that_is_not_there_is_named() -> None:
    with mmap.mmap(-1, 4 * MIB) as there, page_map() as fd:
        word = ctypes.c_char.from_buffer(there)
        address = ctypes.addressof(word)
        del word
        for at in range(0, 4 * MIB, 4096):
            if at != 3 * MIB:
                there[at] = 1
        KINDS.populated(fd, "source 0", address, 3 * MIB)
        with pytest.raises(Invalid, match=f"{address + 3 * MIB:#x} is not there yet"):
            KINDS.populated(fd, "source 0", address, 4 * MIB)


@pytest.mark.parametrize("is_huge", [False, True])
def test_only_huge_pages_have_to_be_there(is_huge: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Noting(DescriptorKinds):
        def populated(self, pagemap_fd: int, field: str, address: int, length_bytes: int) -> None:
            asked.append((address, length_bytes))

    if is_huge:
        in_pages_of(2 * MIB, monkeypatch)
    builder = OfferBuilder(OfferLimits(), Noting(), os.getpid())
    with memory(4 * MIB) as fd, page_map() as pagemap:
        builder.add(REGION, os.dup(fd))  # type: ignore[arg-type]  # offer() gives all kinds
        builder.add(SOURCE, os.dup(pagemap))  # type: ignore[arg-type]  # so
        builder.checked(END).close_descriptors()  # type: ignore[arg-type]  # so
        builder.release()
    assert asked == ([(1 << 40, 4 * MIB)] if is_huge else [])
