"""What query-migrate and its kin say, whatever they leave out."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrd.core.facts import QemuStatus, RunState
from migrd.qemu import samples

ACTIVE: dict[str, Any] = {
    "status": "active",
    "expected-downtime": 300,
    "setup-time": 2,
    "total-time": 182,
    "cpu-throttle-percentage": 20,
    "ram": {
        "total": 268771328,
        "remaining": 225124352,
        "transferred": 27049429,
        "dirty-sync-count": 2,
        "dirty-pages-rate": 81920,
        "page-size": 4096,
        "mbps": 1081.81016,
        "multifd-bytes": 5,
        "postcopy-requests": 0,
    },
    "vfio": {"transferred": 12582912},
}
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*ACTIVE, *ACTIVE["ram"], "port", "type"]), inner)
    ),
    max_leaves=10,
)


def test_units_are_seconds_and_bytes() -> None:
    sample = samples.read_sample(ACTIVE, {"status": "running"}, at_s=7.0, stopped_at_s=3.0)
    assert (sample.qemu_status, sample.run_state) == (QemuStatus.ACTIVE, RunState.RUNNING)
    assert sample.bandwidth_bytes_per_s == 1081.81016e6 / 8
    assert (sample.expected_downtime_s, sample.setup_time_s, sample.total_time_s) == (
        0.3,
        0.002,
        0.182,
    )
    assert (sample.dirty_pages_per_s, sample.page_size_bytes) == (81920, 4096)
    assert (sample.throttle_percent, sample.device_transferred_bytes) == (20, 12582912)
    assert (sample.at_s, sample.stopped_at_s, sample.resumed_at_s) == (7.0, 3.0, None)


def test_a_number_not_measured_yet_is_none_and_not_zero() -> None:
    first_pass = {
        "status": "active",
        "ram": {"mbps": 0, "dirty-sync-count": 1, "dirty-pages-rate": 0},
    }
    sample = samples.read_sample(first_pass, {}, at_s=0.0)
    assert sample.bandwidth_bytes_per_s is None
    assert sample.dirty_pages_per_s is None
    too_soon = {"ram": {"dirty-sync-count": 3, "dirty-pages-rate": 0, "remaining": 8 << 20}}
    assert samples.read_sample(too_soon, {}, at_s=0.0).dirty_pages_per_s is None
    idle = {"ram": {"dirty-sync-count": 2, "dirty-pages-rate": 0, "remaining": 0}}
    assert samples.read_sample(idle, {}, at_s=0.0).dirty_pages_per_s == 0


def test_statuses_of_later_qemus_are_unknown_and_none_at_all_is_none() -> None:
    assert samples.read_status({"status": "teleporting"}) is QemuStatus.UNKNOWN
    assert samples.read_status({}) is QemuStatus.NONE
    sample = samples.read_sample({}, {"status": "dreaming"}, at_s=0.0)
    assert sample.run_state is RunState.UNKNOWN


@given(anything, anything)
def test_no_answer_however_odd_raises(migrate: object, status: object) -> None:
    samples.read_sample(migrate, status, at_s=0.0)
    samples.read_blocked_reasons(migrate)
    samples.read_port(migrate)
    samples.read_memory_bytes(migrate)
    samples.read_passthrough(migrate, status)
    samples.read_version(migrate)
    samples.read_machine_type(status)


def test_the_newest_address_of_a_listener_counts() -> None:
    addresses = [
        {"type": "unix", "path": "/x"},
        {"type": "inet", "host": "127.0.0.1", "port": "44321"},
        {"type": "inet", "host": "127.0.0.1", "port": "1"},
    ]
    assert samples.read_port({"socket-address": addresses}) == 44321
    assert samples.read_port({"socket-address": [{"type": "inet", "port": "high"}]}) is None


def test_passthrough_devices_are_found_by_their_type() -> None:
    named = [
        {"name": "hostdev0", "type": "child<vfio-pci>"},
        {"name": "net0", "type": "child<e1000>"},
    ]
    unnamed = [{"name": "device[0]", "type": "child<vfio-pci-nohotplug>"}]
    assert samples.read_passthrough(named, unnamed) == ("hostdev0", "device[0]")


def test_versions_are_for_people() -> None:
    qemu = {"major": 10, "minor": 0, "micro": 2}
    assert samples.read_version({"version": {"qemu": qemu, "package": "Debian x"}}) == (
        "10.0.2 (Debian x)"
    )
    assert samples.read_version({"version": {"qemu": qemu, "package": ""}}) == "10.0.2"
    assert samples.read_version({}) == "unknown"


MIB = 1 << 20


@pytest.mark.parametrize(
    ("kvm", "memory_bytes", "is_sound", "loses"),
    [
        ({"enabled": False, "present": True}, 64 * MIB, False, True),
        ({"enabled": False, "present": True}, 64 * MIB + 8192, False, False),
        ({"enabled": False, "present": True}, 64 * MIB, True, False),
        ({"enabled": True, "present": True}, 64 * MIB, False, False),
        ({"enabled": False}, None, False, False),
        ("nonsense", 64 * MIB, False, False),
    ],
)
def test_a_tcg_guest_whose_dirty_pages_an_old_qemu_would_lose_is_known(
    kvm: object, memory_bytes: int | None, is_sound: bool, loses: bool
) -> None:
    assert samples.loses_dirty_pages(kvm, memory_bytes, is_sound=is_sound) is loses
