"""Two plans of one VM, here and there: may it go, and could it come back?

Both are made by `tracking.decide`, each from its own host's facts, with the same QEMU ids. A VM
must not arrive where it would be less migratable without someone having agreed.

    go      source migratable · the same devices there · each able to load its state · the
            destination's own refusals · the downtime limit
    return  the destination's plan as a source: "you may go there, but you can't come back"

A device only loads state if its driver there supports migration; whether its DMA can be tracked
there does not matter for arriving, only for leaving again.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from migrd.core.downtime_floor import above_limit, below_floor
from migrd.core.tracking import Migratability, Plan, Reason, ReasonCode


@dataclass(frozen=True)
class DestinationJudgement:
    """All refusals and warnings at once."""

    refusals: tuple[Reason, ...]
    warnings: tuple[Reason, ...]

    @property
    def passed(self) -> bool:
        return not self.refusals


def judge_destination(
    source_plan: Plan,
    destination_plan: Plan,
    downtime_limit_s: float | None,
    *,
    accept_lower: bool = False,
) -> DestinationJudgement:
    """`accept_lower`: someone has agreed that it may be less migratable there."""
    certain = (
        *_of_source(source_plan, downtime_limit_s),
        *_of_devices(source_plan, destination_plan),
        *destination_plan.refused,
        *_cannot_load(destination_plan),
    )
    way_back = tuple(_way_back(source_plan, destination_plan))
    if accept_lower:
        return DestinationJudgement(certain, way_back)
    return DestinationJudgement((*certain, *way_back), ())


def _of_source(plan: Plan, limit_s: float | None) -> Iterator[Reason]:
    if not plan.migratability.is_possible:
        yield Reason(
            ReasonCode.SOURCE_NOT_MIGRATABLE,
            None,
            f"the VM cannot leave as it is: {plan.migratability.value}",
            "mend what the other reasons name",
            plan.migratability,
        )
        yield from plan.limits
    yield from below_floor(limit_s, plan.downtime_floor_s)
    if plan.migratability is Migratability.STOP_AND_COPY:
        yield from above_limit(limit_s, plan.expected_blackout_s)


def _of_devices(source: Plan, destination: Plan) -> Iterator[Reason]:
    here, there = set(source.attach_order), set(destination.attach_order)
    if here != there:
        odd = ", ".join(sorted(here ^ there)[:4])
        yield Reason(
            ReasonCode.DEVICES_DIFFER,
            None,
            f"the VM has other passthrough devices there than here: {odd}",
            "give it the same devices, by QEMU id, on both hosts",
        )
    elif source.attach_order != destination.attach_order and _has_free_slots(source, destination):
        yield Reason(
            ReasonCode.GUEST_ADDRESSES_DIFFER,
            None,
            "the devices would be attached in another order there, so the guest would see them in "
            "other slots",
            "give each device a guest address, on both hosts the same",
        )


def _has_free_slots(*plans: Plan) -> bool:
    return any(
        reason.code is ReasonCode.GUEST_ADDRESS_NOT_FIXED
        for plan in plans
        for reason in plan.reasons
    )


def _cannot_load(plan: Plan) -> Iterator[Reason]:
    for reason in plan.limits:
        if reason.code is ReasonCode.DEVICE_NO_MIGRATION:
            yield Reason(
                ReasonCode.DESTINATION_CANNOT_LOAD,
                reason.device,
                f"there, {reason.message}: its state could not be loaded",
                reason.cure,
            )


def _way_back(source: Plan, destination: Plan) -> Iterator[Reason]:
    if destination.migratability.rank <= source.migratability.rank:
        return
    code = ReasonCode.NO_WAY_BACK
    if destination.migratability.is_possible:
        code = ReasonCode.LESS_MIGRATABLE_THERE
        stands = destination.expected_blackout_s
        how_long = "for a long time" if stands is None else f"for {stands:.1f} s"
        words = f"you may go there, but to come back the guest would stand still {how_long}"
    elif destination.migratability_at_best.rank <= source.migratability.rank:
        words = "you may go there, but it is not known whether you can come back"
    else:
        words = "you may go there, but you can't come back"
    why = "; ".join(dict.fromkeys(reason.message for reason in destination.limits))
    yield Reason(
        code,
        None,
        f"{words} (there it is {destination.migratability.value}): {why}",
        "choose another destination, or accept that it is less migratable there",
        destination.migratability,
    )
