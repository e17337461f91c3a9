"""The calls on dirty rates measured outside of migrations. Reading never measures anything."""

import math
from typing import Annotated, Final

from pydantic import Field

from migrd.api.auth import Scope
from migrd.api.models_sampling import DirtyRate, MeasurementAsked, RateHistory
from migrd.api.table import Answer, Call, Reply, Tag, reply, route
from migrd.api.wire import At, Name, WireModel
from migrd.core.rate_history import FINEST_S, KEPT_S


class RatedVmPath(WireModel):
    vm: Name


class HistoryQuery(WireModel):
    since: Annotated[At | None, Field(alias="from")] = None
    """Left out: an hour ago."""
    step_s: Annotated[int, Field(ge=FINEST_S, le=KEPT_S)] | None = None
    """Left out: as fine as is kept for all of that time (10 s for ten minutes, else a minute)."""


_ASKED: Final = Answer("It will be measured.", MeasurementAsked, headers=("Retry-After",))
_ASKED_BEFORE: Final = Answer("Somebody asked before.", MeasurementAsked, headers=("Retry-After",))


@route(
    "GET",
    "/v1/vms/{vm}/dirty-rate",
    tag=Tag.VMS,
    scope=Scope.READ,
    answers={200: Answer("As it was measured last.", DirtyRate)},
    problems=(404,),
)
async def get_dirty_rate(call: Call, path: RatedVmPath) -> Reply:
    """How fast a VM's memory gets dirty, and its working set, as they were measured last.

    Measured now and then, outside of migrations and within a budget of CPU time for the whole host;
    this call only reads. By each of those who see writes: the guest's CPUs, its passthrough
    devices.
    """
    return reply(DirtyRate.of(call.service.dirty_rates(path.vm)))


@route(
    "GET",
    "/v1/vms/{vm}/dirty-rate/history",
    tag=Tag.VMS,
    scope=Scope.READ,
    answers={200: Answer("Oldest first.", RateHistory)},
    problems=(404,),
)
async def get_dirty_rate_history(call: Call, path: RatedVmPath, query: HistoryQuery) -> Reply:
    """The dirty rates of the last six hours: in steps of 10 s for ten minutes, of a minute before.

    Kept in memory alone: a restart of the daemon forgets them. A time without a measurement has no
    point.
    """
    since = None if query.since is None else query.since.timestamp()
    view = call.service.dirty_rate_history(path.vm, since_wall_s=since, step_s=query.step_s)
    return reply(RateHistory.of(view))


@route(
    "POST",
    "/v1/vms/{vm}/dirty-rate:measure",
    tag=Tag.VMS,
    scope=Scope.WRITE,
    answers={200: _ASKED_BEFORE, 202: _ASKED},
    problems=(404, 409),
)
async def measure_dirty_rate(call: Call, path: RatedVmPath) -> Reply:
    """Measure a VM's dirty rate soon. Many wishes at once are one; the budget holds for all.

    Refused while it is being migrated (`vm_migrating`), does not run (`vm_stopped`), does not
    answer (`vm_unreachable`), or where nothing is measured (`sampling_off`).
    """
    asked = await call.service.measure_dirty_rate(path.vm, by=call.by.label)
    again = str(max(1, math.ceil(asked.within_s)))
    return reply(MeasurementAsked.of(asked), 202 if asked.is_new else 200, Retry_After=again)
