"""Points of the thread (T1 to T10) that the real kernel shows without a QEMU.

The other points are in the tests of migrd itself beside this file, with the same names.
"""

from __future__ import annotations

from errno import EINVAL, EOPNOTSUPP

import pytest

from migrd.core.attach_ladder import Ladder, LadderAction, step
from migrd.core.devices import Evidence, IommuKind, Unknown
from migrd.core.tracking import DomainFlag
from migrd.engine.device_verdict import why_all_track
from migrd.errors import KernelError
from migrd.kernel.inventory import HostInventory
from migrd.kernel.iommufd import Iommufd
from migrd.kernel.page_table import OwnedHwpt
from migrd.kernel.passthrough import KernelPassthrough
from migrd.kernel.vfio import VfioDevice
from tests.core.tracking_cases import by_iommu, plan
from tests.lab.guest.raw import Mtty, mtty

MOCK = "iommufd_selftest_iommu.0"
MOCK_TYPE = 0xFEEDBEEF
"""Of IOMMU_GET_HW_INFO: in no header that a program sees."""


async def test_t3_t5_t10_what_one_device_is_told_is_its_iommus_and_makes_the_one_boolean() -> None:
    """By an IOMMU of a kind that nobody has met, whose registers say nothing."""
    inventory, passthrough = HostInventory(), KernelPassthrough()
    with mtty() as able, mtty() as never_asked, mtty(tracked=False) as unable:
        found = await inventory.rescan()
        unit = found.iommus[MOCK]
        assert (unit.kind, unit.dirty_tracking.reason) == (IommuKind.OTHER, Unknown.NO_REGISTERS)
        assert found.all_iommus_track_dirty is None
        assert MOCK in why_all_track(found)
        for asked, all_track in ((able, True), (unable, False)):
            device = await passthrough.probe(found.devices[asked.sysfs.name])
            assert device.iommu_hardware is not None
            assert device.iommu_hardware.hardware_type == MOCK_TYPE
            found = inventory.note_probed(device)
            assert found.all_iommus_track_dirty is all_track
            unit = found.iommus[MOCK]
            assert unit.dirty_tracking.evidence is Evidence.PROBED
            other = found.devices[never_asked.sysfs.name]
            assert other.iommu == MOCK
            assert other.iommu_dirty_tracking == unit.dirty_tracking
        assert MOCK in why_all_track(found)
        assert found.devices[able.sysfs.name].iommu_dirty_tracking.is_yes, "its own answer stands"
    passthrough.close()


def climbed(
    ladder: Ladder, mdev: Mtty, iommufd: Iommufd, shared: OwnedHwpt | None = None
) -> tuple[Ladder, list[int], OwnedHwpt | None]:
    """Its end, the errnos on the way, and the page table: each call made of the real kernel."""
    device = VfioDevice.open(str(mdev.node), mdev.sysfs.name)
    dev_id = device.bind(iommufd.fileno())
    ioas, hwpt, refused = iommufd.allocate_ioas() if shared is None else shared.ioas, shared, []
    while ladder.action not in (LadderAction.DONE, LadderAction.FAILED):
        tracks = DomainFlag.DIRTY_TRACKING in ladder.rung.flags
        errno: int | None = None
        try:
            if ladder.action is LadderAction.ALLOCATE:
                hwpt = iommufd.allocate_hwpt(dev_id, ioas, dirty_tracking=tracks)
            else:
                assert hwpt is not None
                device.attach(hwpt.id, tracks_dirty=tracks)
        except KernelError as error:
            errno = error.errno
            refused.append(error.errno)
        ladder = step(ladder, errno)
    device.close()
    return ladder, refused, hwpt


@pytest.mark.parametrize(("first_is_able", "errno"), [(False, EOPNOTSUPP), (True, EINVAL)])
def test_t9_the_ladder_knows_a_refusal_by_the_real_kernels_errno_and_goes_on_without(
    first_is_able: bool, errno: int
) -> None:
    """Both were believed able: the first allocates the page table, the second is to share it."""
    ladders = plan(by_iommu("a"), by_iommu("b")).ladders
    with (
        mtty(tracked=first_is_able) as first,
        mtty(tracked=False) as unable,
        Iommufd.open() as iommufd,
    ):
        end, refused, hwpt = climbed(ladders["a"], first, iommufd)
        assert (end.action, end.is_downgraded) == (LadderAction.DONE, not first_is_able)
        assert refused == ([] if first_is_able else [errno])
        if first_is_able:
            end, refused, own = climbed(ladders["b"], unable, iommufd, hwpt)
            assert refused == [errno]
            assert own is not hwpt, "a page table of its own"
        assert (end.action, end.is_downgraded) == (LadderAction.DONE, True)
        assert end.errno == errno, "the reason is kept"
