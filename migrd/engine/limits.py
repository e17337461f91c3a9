"""What QEMU is told of bandwidth and downtime while it copies a running guest.

    ask                the policy as it is now, or the hold: limits without room for a single page
    hold_for, let_go   for one of several conditions each; none is lifted while one of them stands
    hasten             our figures say that what is left fits, and QEMU has not begun by itself

What was not taken is owed, and said again at the next look. Requests may overlap (a condition
changes while QEMU has not answered the last one): they are numbered, and the newest alone says
what is owed.
"""

import contextlib
from typing import Final

from migrd.core.convergence import FIXED_COST_S, Decision
from migrd.engine.outgoing import Outgoing
from migrd.errors import MigrdError, VmmRefused

HOLD_S: Final = 0.001
"""The downtime limit that keeps QEMU in precopy. Not zero: QEMU then takes its estimate for exact,
and switches over when that is zero."""
HOLD_BYTES_PER_S: Final = 256 << 10
"""So that less than a page fits the limit: a guest that writes 64 pages a second is held."""
LEAST_LIMIT_S: Final = 0.001
AT_ONCE_S: Final = 2000.0
"""The largest downtime limit QEMU takes."""


class Limits:
    """Of one run of the precopy step."""

    def __init__(self, m: Outgoing) -> None:
        self._m = m
        self._holds: set[str] = set()
        """The conditions for which QEMU is held in precopy."""
        self.are_owed = False
        """QEMU may not have the limits that it should have."""
        self._asked = 0
        self._hastened = False

    @property
    def is_holding(self) -> bool:
        """QEMU is kept from switching over."""
        return bool(self._holds)

    async def hold_for(self, condition: str, why: str) -> None:
        if condition not in self._holds:
            self._holds.add(condition)
            self._m.trouble(condition, why)
            await self.say()

    async def let_go(self, condition: str) -> None:
        if condition in self._holds:
            self._holds.remove(condition)
            self._m.settle(condition)
            await self.say()

    async def say(self) -> None:
        """As `ask`; what QEMU does not take now is owed."""
        with contextlib.suppress(MigrdError):
            await self.ask()

    async def ask(self) -> None:
        """Give QEMU the policy as it is now, or hold it. Raises the VmmError family; a refusal is
        no error, and owed."""
        self._asked += 1
        mine, self.are_owed = self._asked, True
        taken = await self._set()
        if mine == self._asked:
            self.are_owed = not taken

    async def _set(self) -> bool:
        m, policy = self._m, self._m.state.policy
        bandwidth = policy.max_bandwidth_bytes_per_s
        if self._holds:
            limit_s, bandwidth = HOLD_S, min(bandwidth or HOLD_BYTES_PER_S, HOLD_BYTES_PER_S)
        elif m.state.switchover_forced:
            limit_s = AT_ONCE_S
        else:
            limit_s = max(LEAST_LIMIT_S, policy.downtime_limit_s - FIXED_COST_S)
        self._hastened = False
        try:
            await m.vmm.set_limits(max_bandwidth_bytes_per_s=bandwidth, downtime_limit_s=limit_s)
        except VmmRefused:
            return False
        return True

    async def hasten(self, decision: Decision, *, again: bool) -> None:
        """Our figures say that it fits (or a client says so); QEMU has not begun by itself."""
        m = self._m
        if decision.reason == "forced":
            if not self._hastened:
                await m.vmm.set_limits(downtime_limit_s=AT_ONCE_S)
                self._hastened = True
            return
        bandwidth = decision.estimate.bandwidth_bytes_per_s
        if again and bandwidth and not self._hastened:
            self._hastened = True
            await m.vmm.set_limits(
                downtime_limit_s=m.state.policy.downtime_limit_s,
                switchover_bandwidth_bytes_per_s=int(bandwidth),
            )
