"""A small fleet: what the large one's figures rest on, checked with each run of the tests."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.fakes.virtual_time import VirtualTimeLoop
from tests.fleet.__main__ import SCENARIOS, run
from tests.fleet.fleet import GIB
from tests.fleet.latencies import EtcdLoad, Measured
from tests.fleet.measured import THREE_MEMBERS
from tests.fleet.scenarios import Report

WRITES_EACH = 3
"""Of the record: the source's claim, the grant, the start."""


def small(name: str) -> Report:
    """One rack of it, with guests that move in half a second."""
    whole = SCENARIOS[name]
    rack = replace(whole, racks=3, emptied=1, per_host=1)
    return run(replace(rack, memory_bytes=GIB // 2, trouble_at_s=4.0))


def test_a_rack_is_drained_with_three_writes_for_each_guest() -> None:
    report = small("rack")
    assert dict(report.drained.phases) == {"succeeded": 40}
    assert report.writes == WRITES_EACH * 40
    assert (report.running, report.lost, report.drained.left) == (40, 0, [])


def test_no_guest_stands_still_for_an_etcd_that_is_away() -> None:
    calm, report = small("rack"), small("away")
    assert report.drained.phases["succeeded"] == 40
    assert (report.running, report.drained.left) == (40, [])
    assert max(report.drained.blackouts_s) < 2 * max(calm.drained.blackouts_s)


def test_with_a_rack_of_destinations_only_guests_that_were_in_it_are_lost() -> None:
    report = small("power")
    assert report.lost == report.died
    assert report.running + report.died == 40


def test_an_etcd_that_cannot_keep_up_makes_everybody_wait_in_turn() -> None:
    async def waited(writes_per_s: float) -> float:
        load = EtcdLoad(Measured(((0.0, 0.001), (1.0, 0.001)), writes_per_s, 1e9))
        return max(load() for _ in range(100))

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        assert runner.run(waited(10_000.0)) == pytest.approx(0.001 + 0.0099)
        assert runner.run(waited(100.0)) == pytest.approx(0.001 + 0.99)


def test_leases_that_are_renewed_take_their_share_of_it() -> None:
    async def waited(leases: int) -> float:
        measured = replace(THREE_MEMBERS, renewals_per_s=1000.0)
        load = EtcdLoad(measured, leases=leases, renew_every_s=2.0)
        load()
        await asyncio.sleep(10.0)
        load()
        return load.longest_queue_s

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        assert runner.run(waited(900)) == 0.0
        assert runner.run(waited(2000)) > 5.0
