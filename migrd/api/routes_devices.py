"""The calls on the devices of this host."""

from typing import Annotated, Final

from pydantic import Field

from migrd.api.auth import Scope
from migrd.api.conditions import (
    NoneMatch,
    WatchQuery,
    is_known,
    newer_anywhere,
    newer_than_seen,
    read_token,
    tag,
    write_token,
)
from migrd.api.models_devices import Address, Device, DeviceList, Word
from migrd.api.table import Answer, Call, Reply, Tag, reply, reply_list, route, to_json
from migrd.api.wire import WireModel
from migrd.core import devices as core
from migrd.core.tracking import Migratability
from migrd.engine.service import DeviceView

MAX_PAGE: Final = 1000


class DevicePath(WireModel):
    address: Address


class DevicesQuery(WatchQuery):
    kind: core.DeviceKind | None = None
    driver: Word | None = None
    iommu: Word | None = None
    """Only those behind this IOMMU instance."""
    iommu_group: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    iommu_dirty_tracking: core.Answer | None = None
    migratability: Migratability | None = None
    """Only those of this verdict."""
    passthrough: bool | None = None
    """true: only those that a VFIO driver has; false: only the others."""
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] = 100
    page_token: Annotated[str, Field(max_length=256)] | None = None


_DEVICE: Final = Answer("As it is now.", Device, headers=("ETag",))


@route(
    "GET",
    "/v1/devices",
    tag=Tag.DEVICES,
    scope=Scope.READ,
    answers={200: Answer("One page, by address.", DeviceList)},
)
async def list_devices(call: Call, query: DevicesQuery) -> Reply:
    """Devices of this host that are, or could be, passed through.

    With `watch` it answers when anything on this host is newer than `resource_version`; compare,
    and ask again with the new one.
    """
    version, views = call.service.devices()
    if await newer_anywhere(call, query, version):
        version, views = call.service.devices()
    chosen = [view for view in views if _is_chosen(view, query)]
    if query.page_token is not None:
        after = read_token(query.page_token, str)
        chosen = [view for view in chosen if view.device.address > after]
    shown = chosen[: query.limit]
    more = len(chosen) > len(shown)
    token = write_token(shown[-1].device.address) if more else None
    return await reply_list(version, shown, lambda view: to_json(Device.of(view)), token)


def _is_chosen(view: DeviceView, query: DevicesQuery) -> bool:
    device = view.device
    wanted: tuple[tuple[object, object], ...] = (
        (query.kind, device.kind),
        (query.driver, device.driver),
        (query.iommu, device.iommu),
        (query.iommu_group, device.iommu_group),
        (query.iommu_dirty_tracking, device.iommu_dirty_tracking.answer),
        (query.migratability, view.verdict.migratability),
        (query.passthrough, view.is_ready),
    )
    return all(given is None or given == found for given, found in wanted)


@route(
    "GET",
    "/v1/devices/{address}",
    tag=Tag.DEVICES,
    scope=Scope.READ,
    answers={200: _DEVICE, 304: Answer("It is as the client has it.")},
    problems=(404,),
)
async def get_device(call: Call, path: DevicePath, query: WatchQuery, headers: NoneMatch) -> Reply:
    """One device: its driver, group and IOMMU, what can be tracked and migrated, and the verdict.

    With `watch` it answers when this device is newer than `resource_version`.
    """
    await newer_than_seen(call, query, lambda: call.service.device(path.address).resource_version)
    view = call.service.device(path.address)
    etag = tag(view.resource_version)
    if is_known(headers, etag):
        return Reply(304, headers={"ETag": etag})
    return reply(Device.of(view), ETag=etag)


@route(
    "POST",
    "/v1/devices/{address}:probe",
    tag=Tag.DEVICES,
    scope=Scope.WRITE,
    answers={200: _DEVICE},
    problems=(404, 409),
)
async def probe_device(call: Call, path: DevicePath) -> Reply:
    """Ask the kernel about a device now: it is opened, bound to an iommufd of its own, asked, and
    let go.

    Refused for a device that somebody uses (`device_in_use`) or that no VFIO driver has
    (`driver_not_bound`). What the kernel could not be asked stays unknown, with the reason.
    """
    view = await call.service.probe_device(path.address, by=call.by.label)
    return reply(Device.of(view), ETag=tag(view.resource_version))
