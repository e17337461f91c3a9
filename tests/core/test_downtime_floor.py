"""The downtime floor, the blackout of stop-and-copy, and limits that cannot be met."""

from __future__ import annotations

import pytest

from migrd.core.convergence import FIXED_COST_S
from migrd.core.devices import DeviceMigration
from migrd.core.tracking import Migratability, ReasonCode
from tests.core.tracking_cases import ALL_FLAGS, GIB, YES, by_iommu, by_none, codes, plan

HEAVY = DeviceMigration(YES, ALL_FLAGS, stop_copy_bytes=GIB)
SIZELESS = DeviceMigration(YES, ALL_FLAGS)


def test_the_floor_is_the_fixed_cost_the_devices_state_and_its_loading() -> None:
    devices = by_iommu("a", migration=HEAVY), by_iommu("b", migration=HEAVY)
    assert plan().downtime_floor_s == FIXED_COST_S
    sent = plan(*devices, switchover_bytes_per_s=2 * GIB)
    assert sent.downtime_floor_s == pytest.approx(FIXED_COST_S + 1.0)
    loaded = plan(*devices, switchover_bytes_per_s=2 * GIB, load_bytes_per_s=4 * GIB)
    assert loaded.downtime_floor_s == pytest.approx(FIXED_COST_S + 1.5)


def test_a_limit_below_the_floor_is_refused_with_that_figure() -> None:
    found = plan(by_iommu("a", migration=HEAVY), switchover_bytes_per_s=GIB, downtime_limit_s=0.3)
    (reason,) = found.refused
    assert reason.code is ReasonCode.DOWNTIME_BELOW_FLOOR
    assert "1030 ms" in reason.message
    assert reason.cure.startswith("allow at least 1030 ms")
    allowed = plan(
        by_iommu("a", migration=HEAVY), switchover_bytes_per_s=GIB, downtime_limit_s=1.03
    )
    assert allowed.refused == ()


def test_no_limit_is_refused_for_what_is_not_known() -> None:
    found = plan(
        by_iommu("a", migration=SIZELESS), switchover_bytes_per_s=None, downtime_limit_s=0.3
    )
    assert found.refused == ()
    assert found.downtime_floor_s == FIXED_COST_S
    assert codes(found.reasons) == {"stop_copy_size_unknown", "bandwidth_unknown"}
    assert found.migratability is Migratability.LIVE


def test_the_blackout_of_stop_and_copy_is_all_memory_over_the_bandwidth() -> None:
    found = plan(by_none("a"), memory_bytes=8 * GIB, switchover_bytes_per_s=GIB)
    assert found.expected_blackout_s == pytest.approx(8 + found.downtime_floor_s)
    assert plan(by_iommu("a")).expected_blackout_s is None
    assert plan(by_none("a"), memory_bytes=None).expected_blackout_s is None


def test_a_limit_below_the_blackout_of_stop_and_copy_is_noted_at_start_not_refused() -> None:
    found = plan(by_none("a"), switchover_bytes_per_s=GIB, downtime_limit_s=0.3)
    assert found.refused == ()
    assert "blackout_above_limit" in codes(found.reasons)


def test_a_hostile_size_counts_as_nothing() -> None:
    minus = DeviceMigration(YES, ALL_FLAGS, stop_copy_bytes=-GIB)
    assert plan(by_iommu("a", migration=minus)).downtime_floor_s == FIXED_COST_S
