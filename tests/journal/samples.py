"""Records as the engine writes them."""

from migrd.core.facts import TransferAddress, TransferSettings, VmSpec
from migrd.core.handover import DestinationEvent, DestinationTrigger
from migrd.core.migration import Cause, MigrationEvent, Policy, Refusal, Request, WhenNotConverging
from migrd.core.phases import Trigger
from migrd.engine.ports import StoredIncoming, StoredRequest, StoredVm


def spec(vm: str = "web-1") -> VmSpec:
    return VmSpec(vm, "small", {"memory_mib": 64, "net": True, "disk": "a.img"})


def request(
    id_: str = "m1",
    vm: str = "web-1",
    *,
    epoch: int = 1,
    key: str | None = None,
    created_wall_s: float = 1000.0,
) -> StoredRequest:
    policy = Policy(WhenNotConverging.THROTTLE, downtime_limit_s=0.25, deadline_s=60.0)
    return StoredRequest(
        id=id_,
        request=Request(vm, "host-b", policy, multifd_channels=2, requested_by="ann"),
        spec=spec(vm),
        epoch=epoch,
        created_wall_s=created_wall_s,
        idempotency_key=key,
        body_digest=None if key is None else f"digest of {key}",
    )


def incoming(
    id_: str = "i1", vm: str = "web-2", *, epoch: int = 1, created_wall_s: float = 1000.0
) -> StoredIncoming:
    return StoredIncoming(
        id=id_,
        source="host-a",
        spec=spec(vm),
        epoch=epoch,
        instance="ab12",
        settings=TransferSettings(0.3, 0, multifd_channels=2, peer_name="host-a"),
        created_wall_s=created_wall_s,
    )


def vm(name: str = "web-1", *, epoch: int = 1, here: bool = True) -> StoredVm:
    return StoredVm(spec(name), epoch, here, "ab12" if here else None)


def event(trigger: Trigger = Trigger.STARTED, wall_s: float = 1001.5) -> MigrationEvent:
    return MigrationEvent(trigger, wall_s, 7.25)


def rich_event() -> MigrationEvent:
    """Every field set."""
    return MigrationEvent(
        trigger=Trigger.PREFLIGHT_REFUSED,
        wall_s=1001.5,
        monotonic_s=7.25,
        cause=Cause("no_slot", "all slots of host-b are taken — try later"),
        refusals=(Refusal("no_slot", "4 of 4", "wait"), Refusal("no_tls", "none")),
        address=TransferAddress("192.0.2.1", 49152),
        run_guest=False,
        stopped_at_s=1.125,
        resumed_at_s=2.25,
        source_died=True,
        policy=Policy(max_throttle_percent=50),
    )


def succeeded(wall_s: float = 1001.5) -> list[MigrationEvent]:
    return [
        event(trigger, wall_s)
        for trigger in (
            Trigger.STARTED,
            Trigger.PREFLIGHT_PASSED,
            Trigger.DESTINATION_PREPARED,
            Trigger.SWITCHOVER_REACHED,
            Trigger.TRANSFER_COMPLETED,
            Trigger.DESTINATION_RAN,
            Trigger.SOURCE_RELEASED,
        )
    ]


def destination_event(
    trigger: DestinationTrigger = DestinationTrigger.INCOMING_READY, wall_s: float = 1001.5
) -> DestinationEvent:
    return DestinationEvent(trigger, wall_s, 7.25, address=TransferAddress("192.0.2.1", 49152))


def ran(wall_s: float = 1001.5) -> list[DestinationEvent]:
    return [
        destination_event(trigger, wall_s)
        for trigger in (
            DestinationTrigger.INCOMING_READY,
            DestinationTrigger.GUEST_LOADED,
            DestinationTrigger.GRANT_RECEIVED,
            DestinationTrigger.START_ORDERED,
            DestinationTrigger.GUEST_RAN,
        )
    ]
