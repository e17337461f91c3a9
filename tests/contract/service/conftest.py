"""The engine's service and its simulator, on one stage, in virtual time."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import pytest

from migrd.core.facts import VmSpec
from migrd.core.migration import Policy, Request
from migrd.core.phases import Phase
from migrd.engine.service import Service
from tests.engine.passthrough import hardware, hosts, immovable, nic
from tests.fakes.service import FakeService
from tests.fakes.virtual_time import VirtualTimeLoop
from tests.fakes.world import Pair

SLOW = Policy(max_bandwidth_bytes_per_s=1 << 20)
"""Precopy lasts for minutes: there is time to wish for something."""


def pytest_asyncio_loop_factories(config: Any, item: Any) -> Mapping[str, Any]:
    return {"virtual": VirtualTimeLoop}


class Stage(Protocol):
    """A service with the VM `vm1` running on `here`, and `there` in its roster."""

    here: str
    there: str
    profile: str

    @property
    def service(self) -> Service: ...

    def was_ended_on_purpose(self) -> None:
        """A client stopped the guest: that it is gone is no fault."""

    async def until(self, migration_id: str, phase: Phase) -> None:
        """Let things happen until the migration is in `phase`."""


@dataclass
class FakeStage:
    service: FakeService
    here: str = "host-a"
    there: str = "host-b"
    profile: str = "small"

    def was_ended_on_purpose(self) -> None:
        pass  # it keeps no ground truth

    async def until(self, migration_id: str, phase: Phase) -> None:
        if phase is Phase.CANCELLED:
            self.service.finish_cancel(migration_id)
        else:
            self.service.drive_to(migration_id, phase)


class RealStage:
    here, there, profile = "alpha", "beta", "tiny"

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.service: Service = pair.alpha.service

    def was_ended_on_purpose(self) -> None:
        (violation,) = self.pair.guest("vm1").violations
        assert violation.startswith("I2"), violation
        self.pair.guest("vm1").violations.clear()

    async def until(self, migration_id: str, phase: Phase) -> None:
        await self.pair.until_phase(migration_id, phase.value, within_s=900.0)


def request(stage: Stage, vm: str = "vm1", **more: Any) -> Request:
    return Request(vm, **{"destination": stage.there, "policy": SLOW, **more})


async def begin(stage: Stage, key: str | None = None, digest: str = "d", **more: Any) -> str:
    """The id of a migration that was asked for."""
    view, _ = await stage.service.create_migration(
        request(stage, **more), idempotency_key=key, body_digest=digest
    )
    return view.id


@asynccontextmanager
async def fake_stage() -> AsyncIterator[Stage]:
    service = FakeService()
    await service.define_vm(VmSpec("vm1", "small"), dry_run=False)
    await service.start_vm("vm1")
    yield FakeStage(service)


@asynccontextmanager
async def real_stage() -> AsyncIterator[Stage]:
    async with hosts(hardware(nic(), immovable())) as pair:
        await pair.boot("vm1")
        yield RealStage(pair)


@pytest.fixture(params=["simulated", "engine"])
async def stage(request: pytest.FixtureRequest) -> AsyncIterator[Stage]:
    made = fake_stage() if request.param == "simulated" else real_stage()
    async with made as on_stage:
        yield on_stage
