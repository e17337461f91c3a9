"""At most so much CPU time for samples, over all VMs, whoever asks for them.

Each sample books its cost before it begins, and is told how long to wait; afterwards the books are
put right by what it has really cost. At a share of 1 % a sample of 5 ms fills half a second: the
next one begins after that (a leaky bucket, kept as one time: when it will be empty).

    now ....... free_s            book(cost): wait until free_s - burst_s, free_s += cost / share

Nobody holds anything while it waits or measures: a sample that never ends keeps no other from
beginning. With many VMs the waits grow, and that is how intervals are stretched to fit.
"""

from dataclasses import dataclass


@dataclass
class SamplingBudget:
    """The books of one host. Times are monotonic seconds."""

    share: float
    """Of one core; above 0."""
    burst_s: float = 2.0
    """So much time may be overdrawn: a few samples may begin together."""
    _free_s: float = 0.0

    def book(self, cost_s: float, now_s: float) -> float:
        """Book a sample that may cost so much CPU time; how many seconds to wait before it."""
        begins_s = max(self._free_s, now_s)
        self._free_s = begins_s + max(0.0, cost_s) / self.share
        return max(0.0, begins_s - self.burst_s - now_s)

    def settle(self, booked_s: float, cost_s: float) -> None:
        """It has cost this, instead of what was booked; 0 when it did not take place."""
        self._free_s += (max(0.0, cost_s) - max(0.0, booked_s)) / self.share
