"""What is looked at before a guest sets out."""

from __future__ import annotations

import pytest

from migrd.core.facts import TransferSettings
from migrd.core.memory_map import PAGE_BYTES, MemoryMap
from migrd.direct.offer import (
    OfferedDeviceLog,
    OfferedHwpt,
    OfferedProcess,
    OfferedRange,
    OfferedSource,
)
from migrd.direct.preparation import refuse_unfit, unwatched_pages
from migrd.engine.ports import TlsIdentity
from migrd.errors import VmmRefused

MEMORY = MemoryMap.of([(0, 0, 100 * PAGE_BYTES), (1, 1 << 32, 300 * PAGE_BYTES)])
"""Pages 0 to 99, and 128 to 427."""


def ranges(*runs: tuple[int, int]) -> tuple[OfferedRange, ...]:
    return tuple(
        OfferedRange(n << 40, pages * 4096, first) for n, (first, pages) in enumerate(runs)
    )


ALL = ranges((0, 100), (128, 300))


def unwatched(devices: int, *sources: OfferedSource) -> int:
    return unwatched_pages(MEMORY, sources, devices)


def test_who_watches_cpus_does_not_watch_devices() -> None:
    assert unwatched(1, OfferedProcess(0, ALL)) == 400


def test_a_page_table_watches_all_devices() -> None:
    assert unwatched(3, OfferedHwpt(0, 1, ALL, 4096)) == 0
    assert unwatched(3, OfferedHwpt(0, 1, ranges((0, 90), (130, 300 - 2)), 4096)) == 12


def test_a_log_watches_its_own_device_alone() -> None:
    log = OfferedDeviceLog(0, ALL, 4096)
    assert unwatched(1, log) == 0
    assert unwatched(2, log) == 400
    assert unwatched(2, log, log) == 0
    assert unwatched(2, log, OfferedDeviceLog(0, ranges((128, 300)), 4096)) == 100


def test_a_log_may_come_in_parts_and_a_page_table_see_the_rest() -> None:
    parts = [OfferedDeviceLog(0, ranges(run), 4096) for run in ((0, 50), (50, 50), (128, 300))]
    assert unwatched(1, *parts) == 0
    assert unwatched(2, *parts, OfferedHwpt(0, 1, ranges((128, 300)), 4096)) == 100


@pytest.mark.parametrize(
    ("tls", "peer_name", "has_identity", "why"),
    [
        (False, "host-b", True, "is to be plain"),
        (True, "host-b", False, "no TLS identity"),
        (True, "", True, "with whom is not said"),
    ],
)
def test_encryption_is_never_less_than_this_host_asks_for(
    tls: bool, peer_name: str, has_identity: bool, why: str
) -> None:
    """The settings come from the other host, which might be made to ask for less."""
    identity = TlsIdentity("/nowhere") if has_identity else None
    settings = TransferSettings(0.3, 0, tls=tls, peer_name=peer_name)
    with pytest.raises(VmmRefused, match=why):
        refuse_unfit(settings, identity)
