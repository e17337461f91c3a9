"""A VM some of whose devices' DMA is watched by nobody: stopped first, then copied whole.

    pause the guest -> migrate -> everything is sent once, nothing changes -> switchover as always

QEMU 10 migrates such a device when it is told to (enable-migration=on), and takes no memory for
dirty because of it: what the device writes while the guest runs is not sent again (seen on the real
kernel, tests/lab/guest/e2e/test_holes.py). With the guest stopped its devices are stopped as well.

The guest is then on its way from the beginning of precopy on, so the deadline of a switchover holds
for all of it. Rolling back lets it run again, as after any switchover.
"""

from migrd.core.facts import TransferSample
from migrd.core.migration import MigrationEvent
from migrd.engine.outgoing import Outgoing

CONDITION = "GuestStopped"


class StoppedCopy:
    """What one run of the precopy step knows of it."""

    def __init__(self, m: Outgoing) -> None:
        self._m = m
        self.stopped_at_s: float | None = None
        """Monotonic time that is no later than the stop; None: the guest runs."""

    async def begin(self) -> None:
        """Stop the guest where that is called for: before `migrate`, and again after a restart of
        this daemon. Raises the VmmError family."""
        m = self._m
        if not m.copies_stopped():
            return
        self.stopped_at_s = m.state.timeline[-1].monotonic_s  # the phase's: durable
        await m.vmm.pause_guest()
        m.trouble(
            CONDITION,
            "nothing watches what some of its devices write, so the guest stands still until all "
            "of its memory is copied",
        )

    def overdue(self, now_s: float) -> MigrationEvent | None:
        """The event that brings the guest back, when it has stood still for too long."""
        m = self._m
        if self.stopped_at_s is None or not m.state.run_guest:
            return None
        limit_s = m.world.options.switchover_s(m.state.policy.downtime_limit_s)
        if now_s - self.stopped_at_s < limit_s:
            return None
        return m.failed(
            "switchover_timed_out",
            f"the guest was stopped to be copied whole, which was not over within {limit_s:.1f} s; "
            "it goes on here",
        )

    def since_s(self, sample: TransferSample) -> float:
        """Monotonic time since which the guest stands still, at the switchover."""
        return self.stopped_at_s or sample.stopped_at_s or sample.at_s

    def end(self) -> None:
        """The step is over: what comes next says where the guest is."""
        self._m.settle(CONDITION)
