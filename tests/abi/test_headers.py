"""migrd.abi against the kernel's own headers, by the C compiler."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from migrd.abi import iommufd
from migrd.abi.ioctl import UapiEnum, UapiFlag, UapiStruct, u32, u64
from tests.abi import headers

TARGETS = ("x86_64-linux-gnu", "aarch64-linux-gnu")

all_mirrors = pytest.mark.parametrize(
    "module", headers.mirrors(), ids=lambda module: module.__name__.rpartition(".")[2]
)


@pytest.mark.parametrize("target", TARGETS)
@all_mirrors
def test_the_compiler_agrees_with_every_size_offset_and_number(
    module: ModuleType, target: str, tmp_path: Path
) -> None:
    source = headers.assertions([module])
    assert source.count("_Static_assert") > 20  # the introspection found what is there
    assert headers.complaints(source, target, tmp_path) == ""


@pytest.mark.parametrize("target", TARGETS)
def test_two_fields_swapped_are_caught(target: str, tmp_path: Path) -> None:
    class swapped(UapiStruct):  # flags and hwpt_id: same size, same offsets, same numbers
        _fields_ = [
            ("size", u32),
            ("flags", u32),
            ("hwpt_id", u32),
            *iommufd.iommu_hwpt_get_dirty_bitmap._fields_[3:],
        ]

    lines = headers.struct_assertions(swapped, "iommu_hwpt_get_dirty_bitmap")
    source = "\n".join(["#include <linux/iommufd.h>", *lines, ""])
    said = headers.complaints(source, target, tmp_path)
    assert "iommu_hwpt_get_dirty_bitmap.flags" in said
    assert "iommu_hwpt_get_dirty_bitmap.hwpt_id" in said
    assert "iommu_hwpt_get_dirty_bitmap.iova" not in said


def test_a_wrong_number_and_a_name_unknown_to_the_header_are_caught(tmp_path: Path) -> None:
    class wrong(UapiFlag, prefix="IOMMU_HW_CAP_"):
        DIRTY_TRACKING = 2
        TELEPATHY = 4

    module = ModuleType("wrong_mirror")
    wrong.__module__ = module.__name__
    vars(module).update(HEADERS=("linux/iommufd.h",), wrong=wrong, IOMMU_DESTROY=0x3B81)
    said = headers.complaints(headers.assertions([module]), TARGETS[0], tmp_path)
    assert '"IOMMU_HW_CAP_DIRTY_TRACKING"' in said
    assert "IOMMU_HW_CAP_TELEPATHY" in said
    assert '"IOMMU_DESTROY"' in said


def test_a_field_of_the_wrong_width_or_sign_is_caught(tmp_path: Path) -> None:
    class wrong(UapiStruct):
        _fields_ = [("size", ctypes.c_int32), ("id", ctypes.c_uint16), ("more", ctypes.c_uint16)]

    lines = headers.struct_assertions(wrong, "iommu_destroy")[:-3]
    source = "\n".join(["#include <linux/iommufd.h>", *lines, ""])
    said = headers.complaints(source, TARGETS[0], tmp_path)
    assert "sign of iommu_destroy.size" in said
    assert "size of iommu_destroy.id" in said


@all_mirrors
def test_every_field_has_a_fixed_width_and_structs_have_no_padding(module: ModuleType) -> None:
    """So the layout is the same on every 64-bit machine, compiler at hand or not."""
    for struct in headers.structs(module):
        assert ctypes.sizeof(struct) == sum(_bytes(kind) for _, kind in _fields(struct)), struct
        places = [getattr(struct, name).offset for name, _ in _fields(struct)]
        sizes = [_bytes(kind) for _, kind in _fields(struct)]
        assert places == [0, *itertools.accumulate(sizes)][:-1], f"{struct} has a gap"


def _fields(struct: type[UapiStruct]) -> list[tuple[str, Any]]:
    return [(field[0], field[1]) for field in struct._fields_]


def _bytes(kind: Any) -> int:
    if issubclass(kind, ctypes.Array):
        return _bytes(kind._type_) * int(kind._length_)
    if issubclass(kind, UapiStruct):
        return sum(_bytes(part) for _, part in _fields(kind))
    assert issubclass(kind, headers.SIGNED + headers.UNSIGNED), f"{kind} has no fixed width"
    return ctypes.sizeof(kind)


class _Sample(UapiStruct):
    _fields_ = [("size", u32), ("flags", u32), ("length", u64)]


def test_a_struct_fills_in_its_own_size() -> None:
    assert _Sample(length=1).size == 16
    assert _Sample(size=8).size == 8


def test_a_misspelt_field_is_refused_instead_of_lost() -> None:
    with pytest.raises(AttributeError, match="no field flag"):
        _Sample(flag=1)


@pytest.mark.parametrize("value", [1 << 64, -1])
def test_a_number_that_does_not_fit_is_refused_instead_of_cut(value: int) -> None:
    with pytest.raises(OverflowError):
        _Sample(length=value)


def test_bits_that_no_header_names_are_kept() -> None:
    assert iommufd.iommufd_hw_capabilities(0x9).value == 0x9


def test_every_enum_names_its_prefix() -> None:
    with pytest.raises(TypeError, match="prefix"):

        class nameless(UapiEnum):
            ONE = 1
