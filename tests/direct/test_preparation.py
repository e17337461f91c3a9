"""What is looked at before a guest sets out: who watches what its devices write, and encryption."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from migrd.core.facts import TransferSettings
from migrd.core.memory_map import MemoryMap
from migrd.direct.handoff import HandedOver
from migrd.direct.offer import OfferedDevice, OfferedHwpt, OfferedProcess, OfferedRange
from migrd.direct.preparation import blocked_reasons, refuse_unfit
from migrd.errors import VmmRefused

MEMORY = MemoryMap.of([(0, 0, 128 * 4096), (1, 1 << 30, 64 * 4096)])
LOW = OfferedRange(0x1000_0000, 128 * 4096, 0)
HIGH = OfferedRange(0x2000_0000, 64 * 4096, 128)


def handed_over(*sources: object, devices: tuple[OfferedDevice, ...] = ()) -> HandedOver:
    offered: Any = SimpleNamespace(
        has_offered=True, memory=MEMORY, sources=sources, devices=devices
    )
    return cast(HandedOver, offered)


def test_memory_that_devices_write_and_nobody_watches_blocks_the_move() -> None:
    process = OfferedProcess(3, (LOW, HIGH))
    device = (OfferedDevice("gpu", 4),)
    assert list(blocked_reasons(handed_over(process))) == []
    (reason,) = blocked_reasons(handed_over(process, devices=device))
    assert "192 pages" in reason
    assert "gpu" in reason
    half = OfferedHwpt(5, 1, (LOW,), 4096)
    (reason,) = blocked_reasons(handed_over(process, half, devices=device))
    assert "64 pages" in reason
    other = OfferedHwpt(5, 2, (HIGH,), 1 << 21)
    assert list(blocked_reasons(handed_over(process, half, other, devices=device))) == []


def test_encryption_is_never_left_out_without_a_word_and_postcopy_is_not_offered() -> None:
    with pytest.raises(VmmRefused) as refused:
        refuse_unfit(TransferSettings(0.3, 0, tls=True), None)
    assert refused.value.code == "tls_identity_missing"
    with pytest.raises(VmmRefused) as refused:
        refuse_unfit(TransferSettings(0.3, 0, tls=False, postcopy=True), None)
    assert refused.value.code == "no_postcopy"
    refuse_unfit(TransferSettings(0.3, 0, tls=False), None)
