"""Passthrough devices in QEMU's words, whatever it says of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrd.core.facts import PassthroughFacts
from migrd.core.vfio_launch import GivenBy, QemuVfioFeature, VfioLaunch, VfioLaunchDevice
from migrd.qemu import passthrough
from migrd.qemu.passthrough import DEVICES_BOUND, WORD_BOUND, KnownDevices
from tests.qemu.vfio import FIRST, SECOND, device

RESET = (
    "{}: Failed setting device state to STOP_COPY. Recover state is ERROR. "
    "Resetting device: Input/output error"
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


# What it offers


def test_a_qemu_without_the_object_type_offers_no_iommufd_even_if_the_device_has_the_property() -> (
    None
):
    offered = passthrough.vfio_features({"iommufd": "link", "fd": "str"}, {})
    assert offered == {QemuVfioFeature.DEVICE_FD}


def test_an_iommufd_object_that_takes_no_descriptor_is_told_apart() -> None:
    assert passthrough.vfio_features({"iommufd": "link"}, {"type": "string"}) == {
        QemuVfioFeature.IOMMUFD
    }


def test_what_is_needed_follows_from_how_devices_are_given() -> None:
    legacy = VfioLaunchDevice("a", FIRST, None, GivenBy.SYSFSDEV, "/sys/bus/pci/devices/x")
    assert passthrough.needed_features([legacy], new_iommufds=False) == frozenset()
    assert passthrough.needed_features([device()], new_iommufds=True) == {
        QemuVfioFeature.IOMMUFD,
        QemuVfioFeature.IOMMUFD_FD,
        QemuVfioFeature.DEVICE_FD,
        QemuVfioFeature.MIGRATION_EVENTS,
    }


@given(JSON)
def test_no_answer_about_properties_breaks_the_reading(answer: object) -> None:
    passthrough.vfio_features(passthrough.read_properties(answer), {})


# How it is told


def test_each_property_has_the_type_that_this_qemu_wants() -> None:
    types = {"migration-events": "bool", "enable-migration": "OnOffAuto", "x-pci-device-id": "u"}
    types |= {"bootindex": "int32"}
    asked = VfioLaunchDevice(
        "hostdev0",
        FIRST,
        "iommufd0",
        GivenBy.FD,
        guest_bus="port1",
        guest_address="00.0",
        properties={"migration-events": "on", "enable-migration": "on", "bootindex": "3"},
    )
    assert passthrough.device_add(asked, "migrd-hostdev0", types) == {
        "driver": "vfio-pci",
        "id": "hostdev0",
        "fd": "migrd-hostdev0",
        "iommufd": "iommufd0",
        "bus": "port1",
        "addr": "00.0",
        "migration-events": True,
        "enable-migration": "on",
        "bootindex": 3,
    }


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/sys/bus/mdev/devices/u", {"sysfsdev": "/sys/bus/mdev/devices/u"}),
        (None, {"host": FIRST}),
    ],
)
def test_a_device_without_a_descriptor_is_named(path: str | None, told: dict[str, str]) -> None:
    asked = VfioLaunchDevice("hostdev0", FIRST, None, GivenBy.SYSFSDEV, path)
    expected = {"driver": "vfio-pci", "id": "hostdev0", **told}
    assert passthrough.device_add(asked, "unused", {}) == expected


# What it says


def judged(*reasons: str) -> dict[str, PassthroughFacts]:
    """hostdev0 is called VFIO_FD34, hostdev1 is known by its address alone."""
    devices = [PassthroughFacts("hostdev0"), PassthroughFacts("hostdev1", address=SECOND)]
    found = passthrough.judged(devices, {"VFIO_FD34": "hostdev0"}, reasons)
    return {each.id: each for each in found}


@pytest.mark.parametrize(
    ("reason", "owner"),
    [
        ("VFIO_FD34: VFIO migration is not supported in kernel", "hostdev0"),
        (f"{SECOND}: VFIO migration is not supported in kernel", "hostdev1"),
        ("hostdev1: as QEMU names it later", "hostdev1"),
    ],
)
def test_a_reason_belongs_to_the_device_it_names_by_whatever_name(reason: str, owner: str) -> None:
    found = judged(reason)
    assert (found[owner].migrates, found[owner].blocked_reasons) == (False, (reason,))
    (other,) = set(found) - {owner}
    assert (found[other].migrates, found[other].blocked_reasons) == (True, ())


def test_a_reason_about_vfio_that_names_no_device_makes_all_of_them_unknown() -> None:
    for reason in ("Migration is currently not supported with vIOMMU: VFIO", "VFIO_FD3: odd"):
        assert {each.migrates for each in judged(reason).values()} == {None}
    other = judged("non-migratable device: 0000:00:02.0/nvme")
    assert {each.migrates for each in other.values()} == {True}


def test_the_name_of_a_longer_number_is_another_name() -> None:
    assert judged("VFIO_FD345: VFIO migration is not supported")["hostdev0"].migrates is None


def test_a_reset_device_is_named_by_its_id_where_that_is_known() -> None:
    names = {"VFIO_FD42": "hostdev0"}
    assert passthrough.read_reset_devices(RESET.format("VFIO_FD42"), names) == ("hostdev0",)
    assert passthrough.read_reset_devices(RESET.format(FIRST), names) == (FIRST,)
    for other in (None, "", "Unable to write to socket: Broken pipe", "VFIO_FD42: odd"):
        assert passthrough.read_reset_devices(other, names) == ()


def test_an_endless_error_is_looked_at_in_part() -> None:
    endless = "a" * 10_000_000 + "Resetting device"
    assert passthrough.read_reset_devices(endless, {}) == ()
    assert passthrough.read_reset_devices(RESET.format("d") + endless, {}) == ("d",)


def test_a_plugged_device_is_recognised_by_the_one_reason_that_is_new() -> None:
    old, new = "VFIO_FD7: not supported", "VFIO_FD9: not supported"
    assert passthrough.name_in_new_reason([old], [old, new]) == "VFIO_FD9"
    assert passthrough.name_in_new_reason([old], [old]) is None
    assert passthrough.name_in_new_reason([], [old, new]) is None  # two: whose is which?


# Device states


def told(state: object, id_: str = "hostdev0") -> dict[str, object]:
    return {"device-state": state, "device-id": id_, "qom-path": f"/machine/peripheral/{id_}"}


def test_a_state_that_nobody_has_met_is_kept_in_its_own_word() -> None:
    states = passthrough.with_device_state((), told("pre-copy"))
    states = passthrough.with_device_state(states, told("quantum", "hostdev1"))
    assert states == (("hostdev0", "pre-copy"), ("hostdev1", "quantum"))


def test_a_device_without_an_id_is_known_by_its_place() -> None:
    event = {"device-state": "stop", "device-id": "", "qom-path": "/machine/peripheral-anon/dev[0]"}
    assert passthrough.with_device_state((), event) == (("dev[0]", "stop"),)
    assert passthrough.with_device_state((), {"device-state": "stop"}) == ()


def test_however_many_devices_tell_however_much_what_is_kept_is_bounded() -> None:
    states: passthrough.States = ()
    for number in range(2 * DEVICES_BOUND):
        states = passthrough.with_device_state(states, told("x" * 10_000, f"d{number}"))
    assert len(states) == DEVICES_BOUND
    assert all(len(word) <= WORD_BOUND for _, word in states)
    assert dict(passthrough.with_device_state(states, told("stop", "d0")))["d0"] == "stop"


# Where the guest sees them


@pytest.mark.parametrize(
    ("devfn", "slot"),
    [(0x28, "05.0"), (0x5B, "0b.3"), (255, "1f.7"), (-1, None), (256, None), ("05.0", None)],
)
def test_a_slot_is_written_as_a_launch_names_it(devfn: object, slot: str | None) -> None:
    assert passthrough.read_slot(devfn) == slot


# What a daemon remembers


def test_an_iommufd_object_is_remembered_until_its_last_device_goes() -> None:
    known = KnownDevices()
    known.add(device(), "VFIO_FD9")
    known.add(device("hostdev1", SECOND), None)
    assert known.launch.iommufds == ("iommufd0",)
    assert known.address("hostdev1") == SECOND
    known.remove("hostdev0")
    assert (known.launch.iommufds, known.names) == (("iommufd0",), {})
    known.remove("hostdev1")
    assert known.launch == VfioLaunch()
