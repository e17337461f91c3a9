"""Every reason not to begin, provoked one by one, and all of them at once."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import migrd.core.preflight
from migrd.core.facts import (
    REQUIRED_FEATURES,
    Feature,
    QemuStatus,
    RunState,
    VmFacts,
    VmSpec,
)
from migrd.core.migration import Policy, Request, WhenNotConverging
from migrd.core.preflight import (
    BUSY,
    MOVABLE,
    DestinationFacts,
    SourceFacts,
    check,
    wanted_features,
)

GIB = 1 << 30
ALL = frozenset(Feature)
VM = VmFacts(
    vm="vm1",
    run_state=RunState.RUNNING,
    qemu_status=QemuStatus.NONE,
    qemu_version="10.0.2",
    machine_type="pc-i440fx-7.2",
    memory_bytes=2 * GIB,
    features=ALL,
)
SOURCE = SourceFacts("alpha", VM, VmSpec("vm1", "tiny"), "digest", epoch=3, tls=True)
DESTINATION = DestinationFacts(
    host="beta",
    qemu_version="10.0.2",
    features=frozenset(f.value for f in ALL),
    launch_digest="digest",
    incoming_slots_free=1,
    memory_available_bytes=4 * GIB,
    vm_present=False,
    last_epoch=3,
    tls=True,
    refusals=(),
)
REQUEST = Request("vm1", "beta")


def codes(
    request: Request = REQUEST,
    source: SourceFacts = SOURCE,
    destination: DestinationFacts = DESTINATION,
) -> list[str]:
    return [refusal.code for refusal in check(request, source, destination).refusals]


def vm(**facts: Any) -> SourceFacts:
    return replace(SOURCE, vm=replace(VM, **facts))


def there(**facts: Any) -> DestinationFacts:
    return replace(DESTINATION, **facts)


PROVOKED: dict[str, dict[str, Any]] = {
    "destination_is_source": {"request": Request("vm1", "alpha")},
    "downtime_limit_below_floor": {
        "request": Request("vm1", "beta", Policy(downtime_limit_s=0.001))
    },
    "postcopy_with_passthrough": {
        "request": Request("vm1", "beta", allow_postcopy=True, accept_less_migratable=True),
        "source": vm(passthrough_devices=("hostdev0",)),
    },
    "multifd_with_postcopy": {
        "request": Request("vm1", "beta", multifd_channels=2, allow_postcopy=True),
    },
    "guest_not_movable": {"source": vm(run_state=RunState.INTERNAL_ERROR)},
    "qemu_already_migrating": {"source": vm(qemu_status=QemuStatus.ACTIVE)},
    "qemu_blocks": {"source": vm(blocked_reasons=("nvme",))},
    "qemu_loses_dirty_pages": {"source": vm(may_lose_dirty_pages=True)},
    "no_launch_profile": {"source": replace(SOURCE, spec=VmSpec("vm1", None))},
    "source_lacks_feature": {"source": vm(features=ALL - {Feature.RETURN_PATH})},
    "vm_exists_at_destination": {"destination": there(vm_present=True)},
    "stale_epoch": {"destination": there(last_epoch=4)},
    "tls_mismatch": {"destination": there(tls=False)},
    "arbiter_differs": {"destination": there(arbiter="etcd")},
    "destination_full": {"destination": there(incoming_slots_free=0)},
    "destination_out_of_memory": {"destination": there(memory_available_bytes=GIB)},
    "profile_differs": {"destination": there(launch_digest="another")},
    "destination_lacks_feature": {"destination": there(features=frozenset())},
}


def test_devices_that_nobody_named_are_moved_if_their_vmm_says_who_watches_them() -> None:
    devices = {"passthrough_devices": ("serial0",)}
    assert codes(source=vm(**devices)) == ["devices_not_named"]
    assert codes(source=vm(**devices, watches_dma=True)) == []


def test_hosts_that_fit_have_nothing_to_refuse() -> None:
    result = check(REQUEST, SOURCE, DESTINATION)
    assert result.passed
    assert (result.refusals, result.warnings) == ((), ())


@pytest.mark.parametrize("code", PROVOKED)
def test_each_reason_is_found_alone_and_says_what_it_found(code: str) -> None:
    assert codes(**PROVOKED[code]) == [code]
    (refusal,) = check(**{**DEFAULTS, **PROVOKED[code]}).refusals
    assert refusal.message


DEFAULTS: dict[str, Any] = {"request": REQUEST, "source": SOURCE, "destination": DESTINATION}


def test_every_reason_that_the_module_knows_is_provoked_here() -> None:
    text = Path(str(migrd.core.preflight.__file__)).read_text()
    known = set(re.findall(r'Refusal\(\s*"([a-z_]+)"', text))
    known |= {f"{side}_lacks_feature" for side in ("source", "destination")}
    warnings = {"memory_unknown", "qemu_versions_differ"}
    assert known - warnings == set(PROVOKED)


def test_all_reasons_are_told_at_once() -> None:
    request = Request("vm1", "beta", Policy(downtime_limit_s=0.001))
    source = vm(run_state=RunState.SHUTDOWN, blocked_reasons=("nvme", "ivshmem"))
    destination = there(vm_present=True, tls=False, incoming_slots_free=0, launch_digest="x")
    assert codes(request, source, destination) == [
        "downtime_limit_below_floor",
        "guest_not_movable",
        "qemu_blocks",
        "qemu_blocks",
        "vm_exists_at_destination",
        "tls_mismatch",
        "destination_full",
        "profile_differs",
    ]


def test_the_destinations_own_reasons_are_passed_on_with_its_name() -> None:
    destination = there(refusals=(("unknown_profile", "no profile tiny"),), launch_digest=None)
    (refusal,) = check(REQUEST, SOURCE, destination).refusals
    assert refusal.code == "unknown_profile"
    assert refusal.message.startswith("beta: ")


@pytest.mark.parametrize("state", RunState)
def test_only_a_guest_in_a_known_good_state_is_moved(state: RunState) -> None:
    refused = "guest_not_movable" in codes(source=vm(run_state=state))
    assert refused == (state not in (RunState.RUNNING, RunState.PAUSED, RunState.PRELAUNCH))
    assert RunState.UNKNOWN not in MOVABLE


@pytest.mark.parametrize("status", QemuStatus)
def test_a_qemu_in_somebody_elses_migration_is_left_alone(status: QemuStatus) -> None:
    refused = "qemu_already_migrating" in codes(source=vm(qemu_status=status))
    ended = {
        QemuStatus.NONE,
        QemuStatus.COMPLETED,
        QemuStatus.FAILED,
        QemuStatus.CANCELLED,
    }
    if status in ended:
        assert not refused
    if status in BUSY or status.is_postcopy:
        assert refused


def test_what_could_not_be_found_out_is_a_warning_where_going_on_is_safe() -> None:
    unknown = there(memory_available_bytes=None, qemu_version="7.2.1", launch_digest=None)
    result = check(REQUEST, SOURCE, unknown)
    assert result.passed
    assert {w.code for w in result.warnings} == {"memory_unknown", "qemu_versions_differ"}


def test_an_epoch_that_is_behind_at_the_destination_is_no_reason() -> None:
    assert codes(destination=there(last_epoch=0)) == []


def test_features_from_the_future_are_no_reason() -> None:
    features = DESTINATION.features | {"from_the_future"}
    assert codes(destination=there(features=features)) == []


@pytest.mark.parametrize(
    ("request_", "tls", "more"),
    [
        (REQUEST, False, set()),
        (REQUEST, True, {Feature.TLS}),
        (Request("v", "d", multifd_channels=2), False, {Feature.MULTIFD}),
        (Request("v", "d", allow_postcopy=True), False, {Feature.POSTCOPY}),
        (
            Request("v", "d", Policy(when_not_converging=WhenNotConverging.THROTTLE)),
            False,
            {Feature.AUTO_CONVERGE},
        ),
    ],
)
def test_a_request_wants_what_it_uses(request_: Request, tls: bool, more: set[Feature]) -> None:
    assert wanted_features(request_, tls=tls) == REQUIRED_FEATURES | more
