"""Descriptors of devices on their way into a new QEMU."""

import fcntl
import os
from dataclasses import replace

import pytest

from migrd.core.vfio_launch import VfioLaunch
from migrd.engine.ports import PassedDevices
from migrd.errors import Invalid
from migrd.qemu.inheriting import inheritable
from tests.qemu.vfio import FIRST, SECOND, device, passed


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_what_is_inherited_is_a_copy_that_lives_as_long_as_the_start() -> None:
    with passed(device(), device("hostdev1", SECOND, "iommufd1")) as given:
        own = {*given.iommufds, *given.device_fds.values()}
        with inheritable(given) as inherited:
            copies = set(inherited.fds)
            assert len(copies) == 4
            assert not copies & own
            assert min(copies) > 2
            assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in copies)
            same = os.fstat(inherited.device_fds[FIRST]).st_ino
            assert same == os.fstat(given.device_fds[FIRST]).st_ino
        assert not any(map(is_open, copies))
        assert all(map(is_open, own))


def test_the_command_line_names_the_copies_and_each_device_its_own() -> None:
    with passed(device(), device("hostdev1", SECOND)) as given, inheritable(given) as inherited:
        said = " ".join(inherited.arguments())
        for id_, address in (("hostdev0", FIRST), ("hostdev1", SECOND)):
            [argument] = [word for word in said.split() if f"id={id_}," in word]
            assert f"fd={inherited.device_fds[address]}" in argument.split(",")
        assert f"iommufd,id=iommufd0,fd={inherited.iommufds[0]}" in said
        names = inherited.known_devices.names
        assert names[f"VFIO_FD{inherited.device_fds[SECOND]}"] == "hostdev1"


def test_nobody_is_given_nothing() -> None:
    with inheritable(None) as inherited:
        assert (inherited.fds, inherited.arguments(), inherited.locked_bytes(1 << 30)) == (
            (),
            [],
            0,
        )


def test_each_descriptor_has_its_device_and_each_device_its_descriptor() -> None:
    with passed(device()) as given:
        other = VfioLaunch(("iommufd0",), True, (device(address=SECOND),))
        for wrong in (
            replace(given, launch=other),
            replace(given, iommufds=[*given.iommufds, *given.iommufds]),
            PassedDevices(VfioLaunch(), (), given.device_fds),
        ):
            with pytest.raises(Invalid) as refused, inheritable(wrong):
                pass
            assert {v.code for v in refused.value.violations} == {"bad_descriptors"}
