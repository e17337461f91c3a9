"""What passthrough devices have to do with whether a migration may begin.

Both hosts have decided about them from their own facts; `core.two_hosts` judges the two plans, both
ways. What is said here besides is about a plan that is missing.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from migrd.core.migration import Refusal, Request
from migrd.core.preflight_facts import DestinationFacts, SourceFacts
from migrd.core.tracking import Plan, Reason
from migrd.core.two_hosts import judge_destination


@dataclass(frozen=True)
class DevicePreflight:
    """All at once."""

    refusals: tuple[Refusal, ...] = ()
    warnings: tuple[Refusal, ...] = ()


def of_devices(
    request: Request, source: SourceFacts, destination: DestinationFacts
) -> DevicePreflight:
    """Every refusal and warning that passthrough devices are the reason of."""
    unnamed = _unnamed(source)
    accepted = request.accept_less_migratable
    if not source.spec.devices:
        return DevicePreflight((), unnamed) if accepted else DevicePreflight(unnamed)
    if source.plan is None:
        vm = source.spec.name
        missing = Refusal(
            "no_decision",
            f"nothing was decided about the passthrough devices of {vm}: it is not known whether "
            "their DMA is watched",
            f"define it anew with its devices: PUT /v1/vms/{vm}",
        )
        return DevicePreflight((missing,))
    if destination.plan is None:
        return _no_plan_there(destination)
    lost = tuple(_not_in_qemu(source))
    judged = judge_destination(
        source.plan,
        destination.plan,
        request.policy.downtime_limit_s,
        accept_lower=accepted,
    )
    return DevicePreflight(
        (
            *(() if accepted else unnamed),
            *lost,
            *(as_refusal(reason, source.plan) for reason in judged.refusals),
        ),
        (
            *(unnamed if accepted else ()),
            *(as_refusal(reason, source.plan) for reason in judged.warnings),
        ),
    )


def _not_in_qemu(source: SourceFacts) -> Iterator[Refusal]:
    """Devices that its QEMU has no more (the guest let go of them when nobody waited): the guest
    would find them again there, in a state that nobody has sent."""
    for device in source.spec.devices if source.is_as_it_is else ():
        if device.id not in source.vm.passthrough_devices:
            yield Refusal(
                "devices_differ",
                f"{source.spec.name} is defined with {device.id} ({device.address}), and its QEMU "
                "does not have it",
                f"take it out of the definition (migrd vms unplug {source.spec.name} {device.id}), "
                "or plug it in again",
            )


def _unnamed(source: SourceFacts) -> tuple[Refusal, ...]:
    """Devices that its profile has, or that others have given it: nobody decided about them, and
    QEMU's own checks let some be moved whose DMA is lost (H2, H3). Someone may accept that."""
    named = {device.id for device in source.spec.devices}
    has = [id_ for id_ in source.vm.passthrough_devices if id_ not in named]
    if not has or not source.is_as_it_is or source.vm.watches_dma:
        return ()
    vm = source.spec.name
    unnamed = Refusal(
        "devices_not_named",
        f"the definition of {vm} does not name passthrough devices ({', '.join(has)}): whether "
        "all their DMA is watched was not decided, and QEMU's own checks have holes",
        f"name them by QEMU id and address (PUT /v1/vms/{vm}), or say that you know they are "
        "watched: --accept-less-migratable",
    )
    return (unnamed,)


def _no_plan_there(destination: DestinationFacts) -> DevicePreflight:
    if destination.refusals:
        return DevicePreflight()  # they say why it could decide nothing
    return DevicePreflight(
        (
            Refusal(
                "destination_decides_nothing",
                f"migrd on {destination.host} said nothing about the VM's passthrough devices",
                f"bring migrd on {destination.host} to the version of this one",
            ),
        )
    )


def as_refusal(reason: Reason, plan: Plan) -> Refusal:
    """A reason of the decision in preflight's words; the device by its id and address here."""
    launch = plan.launch
    devices = () if launch is None else launch.devices
    address = next((one.address for one in devices if one.id == reason.device), None)
    if reason.device is None or reason.device in reason.message:
        place = ""
    else:
        place = f"{reason.device}: " if address is None else f"{reason.device} ({address}): "
    return Refusal(reason.code.value, f"{place}{reason.message}", reason.cure)
