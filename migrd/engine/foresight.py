"""What a plan foretells of a migration, from the VM's last measured dirty rate."""

from collections.abc import Sequence
from dataclasses import replace

from migrd.core.migration import Policy
from migrd.core.prediction import predict
from migrd.core.rate_reading import Tracker, headline
from migrd.engine.rate_views import TrackerRates
from migrd.engine.service import PlanView


def foresee(
    view: PlanView,
    trackers: Sequence[TrackerRates],
    policy: Policy,
    bandwidth_bytes_per_s: float | None,
) -> PlanView:
    """`view` with what can be foretold. `bandwidth_bytes_per_s`: of the newest migration; where
    there was none, the policy's limit, if it has one. What devices write is not counted: outside of
    migrations nobody sees it."""
    cpu = next((each for each in trackers if each.tracker is Tracker.QEMU), None)
    best = None if cpu is None else headline(cpu.readings)
    if cpu is None or best is None or best.rate is None:
        return view
    view = replace(view, dirty_bytes_per_s=best.rate.value, dirty_rate_age_s=cpu.age_s)
    limits = [bandwidth_bytes_per_s or 0.0, float(policy.max_bandwidth_bytes_per_s)]
    bandwidth = min((limit for limit in limits if limit > 0), default=0.0)
    if cpu.working_set is None or view.memory_bytes is None:
        return view
    found = predict(
        cpu.working_set,
        memory_bytes=view.memory_bytes,
        bandwidth_bytes_per_s=bandwidth,
        downtime_limit_s=policy.downtime_limit_s,
    )
    if found is None:
        return view
    return replace(
        view,
        predicted_total_s=found.total_s,
        predicted_blackout_s=found.blackout_s,
        predicted_converges=found.converges,
    )
