"""The calls on the passthrough devices of one VM."""

from typing import Final

from migrd.api.auth import Scope
from migrd.api.conditions import tag
from migrd.api.models_host import DevicePlug, Vm
from migrd.api.models_plan import QemuId
from migrd.api.table import Answer, Call, Reply, Tag, reply, route
from migrd.api.wire import Name, WireModel
from migrd.engine.service import PlugRequest


class VmDevicesPath(WireModel):
    vm: Name


class VmDevicePath(WireModel):
    vm: Name
    device: QemuId


_VM: Final = Answer("The VM, with the decision that stands from now on.", Vm, headers=("ETag",))


@route(
    "POST",
    "/v1/vms/{vm}/devices",
    tag=Tag.VMS,
    scope=Scope.WRITE,
    answers={200: _VM},
    problems=(404, 409, 502, 504),
)
async def plug_device(call: Call, path: VmDevicesPath, body: DevicePlug) -> Reply:
    """Add a passthrough device to a VM, running or not.

    It is judged first, against the decision that stands: what would make the VM less migratable is
    refused with the reasons (`lowers_migratability`), unless the request accepts that, and nothing
    is touched. Never during a migration. Said again, it changes nothing more.
    """
    request = PlugRequest(
        address=body.address,
        id=body.id,
        guest_bus=body.guest_bus,
        guest_address=body.guest_address,
        accept_lower=body.accept_lower_migratability,
    )
    view = await call.service.plug_device(path.vm, request, by=call.by.label)
    return reply(Vm.of(view), ETag=tag(view.resource_version))


@route(
    "DELETE",
    "/v1/vms/{vm}/devices/{device}",
    tag=Tag.VMS,
    scope=Scope.WRITE,
    answers={200: _VM},
    problems=(404, 409, 502, 504),
)
async def unplug_device(call: Call, path: VmDevicePath) -> Reply:
    """Take a passthrough device out of a VM, together with the guest, which has to let go of it.

    The decision is made again and may rise. `unplug_pending` (503): the guest has not let go yet;
    ask again to go on waiting. Never during a migration.
    """
    view = await call.service.unplug_device(path.vm, path.device, by=call.by.label)
    return reply(Vm.of(view), ETag=tag(view.resource_version))
