"""QEMU's last words about a page table: understood where they are certain, else not acted on."""

from errno import EBUSY, EINVAL, EOPNOTSUPP

import pytest

from migrd.core.attach_ladder import LadderAction
from migrd.core.attach_words import AttachFailure, next_rung, read_failure
from migrd.core.devices import Capability
from migrd.core.tracking import Plan, TrackingPolicy, TrackingRequest, VmDevice, decide
from migrd.core.vfio_launch import QemuVfioFeature
from tests.fakes.inventory import CAN, LIVE, pci

ALLOCATE, ATTACH = LadderAction.ALLOCATE, LadderAction.ATTACH


def plan(count: int = 2, policy: TrackingPolicy = TrackingPolicy.AUTO) -> Plan:
    devices = tuple(
        VmDevice(
            f"hostdev{n}",
            pci(
                f"0000:41:00.{n}",
                CAN,
                iommu_group=n,
                vfio_cdev=f"/dev/vfio/devices/vfio{n}",
                migration=LIVE,
                dma_logging=Capability.probed(False),
            ),
        )
        for n in range(count)
    )
    everything = frozenset(QemuVfioFeature)
    return decide(TrackingRequest(devices, everything, policy, iommus={CAN.name: CAN}))


def line(id_: str, said: str) -> str:
    return f"qemu-system-x86_64: -device vfio-pci,id={id_},fd=34,iommufd=i0: vfio VFIO_FD34: {said}"


@pytest.mark.parametrize(
    ("said", "action", "errno"),
    [
        ("Failed to allocate hwpt: Operation not supported", ALLOCATE, EOPNOTSUPP),
        ("[iommufd=7] error attach VFIO_FD34 (34) to id=2: Invalid argument", ATTACH, EINVAL),
        ("[iommufd=7] error attach x (34) to id=2: Device or resource busy", ATTACH, EBUSY),
    ],
)
def test_device_call_and_errno_are_told_apart(said: str, action: LadderAction, errno: int) -> None:
    words = f"a warning before it\n{line('hostdev1', said)}\n"
    assert read_failure(words, plan()) == AttachFailure("hostdev1", action, errno)


def test_json_syntax_and_addresses_name_the_device_too() -> None:
    told = "Failed to allocate hwpt: Operation not supported"
    as_json = f'-device {{"driver":"vfio-pci","id":"hostdev1"}}: vfio x: {told}'
    assert read_failure(as_json, plan()) == AttachFailure("hostdev1", ALLOCATE, EOPNOTSUPP)
    by_address = f"vfio 0000:41:00.0: {told}"
    assert read_failure(by_address, plan()) == AttachFailure("hostdev0", ALLOCATE, EOPNOTSUPP)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "could not open disk image: Operation not supported",
        "vfio VFIO_FD34: Failed to allocate hwpt: Operation not supported",  # which of the two?
        line("hostdev1", "Failed to allocate hwpt: Eine unbekannte Sprache"),
        line("hostdev11", "Failed to allocate hwpt: Operation not supported"),
    ],
)
def test_what_is_not_certain_is_not_understood(words: str) -> None:
    assert read_failure(words, plan()) is None


def test_the_only_device_is_meant_however_it_is_called() -> None:
    words = "vfio VFIO_FD34: Failed to allocate hwpt: Operation not supported"
    failure = read_failure(words, plan(1))
    assert failure is not None
    assert failure.device == "hostdev0"


def test_each_errno_leads_where_the_ladder_says() -> None:
    first, second = plan().attach_order
    lower = next_rung(plan(), AttachFailure(first, ALLOCATE, EOPNOTSUPP))
    assert lower is not None
    assert lower.is_downgraded
    lower = next_rung(plan(), AttachFailure(second, ATTACH, EINVAL))
    assert lower is not None
    assert lower.is_downgraded
    assert lower.rung.own_domain
    assert next_rung(plan(), AttachFailure(first, ALLOCATE, EBUSY)) is None
    assert next_rung(plan(), AttachFailure("stranger", ALLOCATE, EOPNOTSUPP)) is None


def test_under_require_there_is_no_lower_rung() -> None:
    required = plan(policy=TrackingPolicy.REQUIRE)
    first = required.attach_order[0]
    assert next_rung(required, AttachFailure(first, ALLOCATE, EOPNOTSUPP)) is None
