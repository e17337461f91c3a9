"""What no switchover of a VM can be shorter than, and how long stop-and-copy takes.

    floor    = fixed cost + sum of the devices' stop-copy bytes / switchover bandwidth + load
    blackout = floor + memory / switchover bandwidth                       (stop_and_copy)

The floor is a lower bound: what is not known counts as nothing, and the plan says so. Load is what
the destination's devices need beyond receiving, where their rate is known. A limit below the floor
is refused with this figure: QEMU would precopy for ever.
"""

from collections.abc import Iterator

from migrd.core.convergence import FIXED_COST_S
from migrd.core.devices import Answer
from migrd.core.tracking_layout import Layout
from migrd.core.tracking_reasons import HOW, Probe, Reason, ReasonCode
from migrd.core.tracking_request import TrackingRequest

_MOST_NAMED = 4


def floor_s(request: TrackingRequest) -> float:
    """Seconds."""
    bytes_ = sum(
        max(0, one.device.migration.stop_copy_bytes or 0)
        for one in request.devices
        if one.device.is_passthrough
    )
    seconds = FIXED_COST_S
    if request.switchover_bytes_per_s:
        seconds += bytes_ / request.switchover_bytes_per_s
    if request.load_bytes_per_s:
        seconds += bytes_ / request.load_bytes_per_s
    return seconds


def blackout_s(request: TrackingRequest) -> float | None:
    """Of stop-and-copy, in seconds; None when memory or bandwidth is not known."""
    if request.memory_bytes is None or not request.switchover_bytes_per_s:
        return None
    return floor_s(request) + request.memory_bytes / request.switchover_bytes_per_s


def below_floor(limit_s: float | None, floor: float) -> Iterator[Reason]:
    """The refusal of a limit that cannot be met."""
    if limit_s is not None and limit_s < floor:
        yield Reason(
            ReasonCode.DOWNTIME_BELOW_FLOOR,
            None,
            f"a downtime limit of {limit_s * 1000:.0f} ms is below what a switchover of this VM "
            f"takes at least ({_ms(floor)} ms): precopy would never end",
            f"allow at least {_ms(floor)} ms, or use a faster link",
        )


def above_limit(limit_s: float | None, blackout: float | None) -> Iterator[Reason]:
    """Stop-and-copy under a limit that was made for live migration."""
    if limit_s is not None and blackout is not None and blackout > limit_s:
        yield Reason(
            ReasonCode.BLACKOUT_ABOVE_LIMIT,
            None,
            f"copied whole, the guest would stand still for {_ms(blackout)} ms; "
            f"the limit is {limit_s * 1000:.0f} ms",
            f"allow {_ms(blackout)} ms, or see what keeps the VM from being live",
        )


def _ms(seconds: float) -> int:
    """Rounded up, so that the figure is enough when it is asked for."""
    return int(-(-seconds * 1000 // 1))


def unknown_figures(layout: Layout) -> Iterator[Reason]:
    """Notes: what the floor leaves out."""
    sizeless = [
        one.id
        for one in layout.traits.values()
        if one.migrates is not Answer.NO and one.vm_device.device.migration.stop_copy_bytes is None
    ]
    if sizeless:
        more = f" and {len(sizeless) - _MOST_NAMED} more" if len(sizeless) > _MOST_NAMED else ""
        yield Reason(
            ReasonCode.STOP_COPY_SIZE_UNKNOWN,
            None,
            "the downtime floor leaves out the state of "
            f"{', '.join(sizeless[:_MOST_NAMED])}{more}: its size is not known",
            HOW[Probe.MIG_DATA_SIZE],
            probe=Probe.MIG_DATA_SIZE,
        )
    if layout.traits and not layout.request.switchover_bytes_per_s:
        yield Reason(
            ReasonCode.BANDWIDTH_UNKNOWN,
            None,
            "the downtime floor leaves out the transfer: the switchover bandwidth is not known",
            "name the bandwidth of the link to the destination",
        )
