"""The deadline of a migration over the lives of its daemon.

It counts from the request, restarts or not. But a daemon that was away while it ran out has let
nothing happen that could have met it: what was left when it was last heard of is then given, up to
GRACE_S, to see where the migration stands. So a long absence does not end a migration at once that
is about to be over, and a daemon that dies again and again does not put its deadline off.

Another boot has another monotonic clock: there the wall clock says how long ago the request was.
"""

from dataclasses import dataclass
from typing import Final

GRACE_S: Final = 30.0


@dataclass(frozen=True)
class Deadline:
    """When it counts from, and before when it does not strike; monotonic, of this boot."""

    asked_s: float
    not_before_s: float = float("-inf")

    def at_s(self, deadline_s: float) -> float:
        """Monotonic time at which it strikes, for a policy's `deadline_s`."""
        return max(self.asked_s + deadline_s, self.not_before_s)


def taken_up(
    *,
    asked_s: float,
    asked_wall_s: float,
    last_seen_s: float,
    deadline_s: float,
    now_s: float,
    now_wall_s: float,
) -> Deadline:
    """After a restart. `last_seen_s`: the newest monotonic time in the journal of the migration."""
    if last_seen_s > now_s:
        return Deadline(now_s - max(0.0, now_wall_s - asked_wall_s))
    left_s = max(0.0, asked_s + deadline_s - last_seen_s)
    return Deadline(asked_s, now_s + min(GRACE_S, left_s))
