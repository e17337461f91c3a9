"""Will it converge, and what to do about it: rounds in, estimate and decision out.

Words: a round is one dirty sync of QEMU; D the dirty rate, B the bandwidth measured over a round,
R what remains after the sync, L the downtime limit, c the fixed cost of a switchover.

    predicted blackout = c + R / B
    next round's R     = D * R / B         (each byte sent costs 1/B s, in which D/B bytes get
    dirty)

so with lambda = D / B < 1 the rounds shrink geometrically (Clark et al., NSDI 2005; Liu et al.,
HPDC 2011) until R fits (L - c) * B, and with lambda >= 1 they do not. D is taken from the rounds
as distinct pages dirtied per second, which saturates at the working set: a working set smaller
than (L - c) * B always converges, and that shows in R itself, so R is looked at before lambda.

A throttle of p leaves D * (1 - p). One step is computed from the rounds, p = 1 - AIM * B / D,
instead of climbing by tens: on real QEMU that costs the guest less than half the time.

Nothing here is certain: `converges` is None until two rounds were seen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from migrd.core.facts import Round
from migrd.core.migration import Policy, WhenNotConverging

AIM: Final = 0.75
"""Share of the bandwidth that a throttled guest may dirty: the rest is what makes rounds shrink."""
FIXED_COST_S: Final = 0.03
"""c: device state, two journals and a round trip; measured on an idle pair, QEMU 7.2 and 10.0."""
ROUNDS_TO_JUDGE: Final = 3
"""So many rounds in a row must fail to shrink before the guest is called not converging."""
SHRINKS: Final = 0.96
"""A round that leaves less than this share of the best one so far counts as progress."""
MAX_PREDICTED_ROUNDS: Final = 60


class Verdict(StrEnum):
    """What the policy answers to a round."""

    CONTINUE = "continue"
    SWITCH_OVER = "switch_over"
    THROTTLE = "throttle"
    START_POSTCOPY = "start_postcopy"
    GIVE_UP = "give_up"


@dataclass(frozen=True)
class Estimate:
    """What the rounds so far say. None: they do not say yet."""

    predicted_blackout_s: float | None
    """If the switchover began now."""
    predicted_remaining_s: float | None
    """Until the guest runs on the destination, as things are; None also when it will not."""
    converges: bool | None
    dirty_bytes_per_s: float | None
    bandwidth_bytes_per_s: float | None


@dataclass(frozen=True)
class Decision:
    """One verdict with its inputs, kept with the migration."""

    verdict: Verdict
    reason: str
    """Stable code."""
    message: str
    """The same for people, with the figures."""
    round_number: int
    at_s: float
    """Monotonic."""
    estimate: Estimate
    throttle_percent: int | None = None
    """With THROTTLE: the percentage to set."""


@dataclass(frozen=True)
class Situation:
    """Everything a decision may look at."""

    rounds: Sequence[Round]
    policy: Policy
    at_s: float
    deadline_at_s: float
    """Monotonic time at which the policy's deadline is over."""
    forced: bool = False
    postcopy_possible: bool = False
    postcopy_started: bool = False
    throttle_percent: int = 0
    """Asked for so far."""


def estimate(rounds: Sequence[Round], policy: Policy) -> Estimate:
    """The prediction from the rounds so far; pure arithmetic on the last few."""
    if not rounds:
        return Estimate(None, None, None, None, None)
    last = rounds[-1]
    bandwidth = _bandwidth(rounds)
    dirty = None
    if last.dirty_pages_per_s is not None:
        dirty = last.dirty_pages_per_s * last.page_size_bytes
    if bandwidth is None or not 1 <= bandwidth < math.inf:  # as good as none
        return Estimate(None, None, None, dirty, None)
    blackout = FIXED_COST_S + last.remaining_bytes / bandwidth
    converges = _converges(rounds, policy, bandwidth, dirty)
    remaining = None
    if converges is not False and dirty is not None:
        remaining = _time_to_fit(last.remaining_bytes, bandwidth, dirty, policy)
    return Estimate(blackout, remaining, converges, dirty, bandwidth)


def _bandwidth(rounds: Sequence[Round]) -> float | None:
    """Bytes per second over the last rounds that sent something, weighted by their duration."""
    recent = [r for r in rounds[-3:] if r.duration_s > 0 and r.transferred_bytes > 0]
    seconds = sum(r.duration_s for r in recent)
    if seconds > 0:
        return sum(r.transferred_bytes for r in recent) / seconds
    return rounds[-1].bandwidth_bytes_per_s


def _fits(bytes_: float, bandwidth: float, policy: Policy) -> bool:
    return FIXED_COST_S + bytes_ / bandwidth <= policy.downtime_limit_s


def _converges(
    rounds: Sequence[Round], policy: Policy, bandwidth: float, dirty: float | None
) -> bool | None:
    if _fits(rounds[-1].remaining_bytes, bandwidth, policy):
        return True
    if len(rounds) <= ROUNDS_TO_JUDGE:
        return None if dirty is None or len(rounds) < 2 or dirty >= bandwidth else True
    best_before = min(r.remaining_bytes for r in rounds[:-ROUNDS_TO_JUDGE])
    if min(r.remaining_bytes for r in rounds[-ROUNDS_TO_JUDGE:]) < SHRINKS * best_before:
        return True
    return dirty is not None and dirty < AIM * bandwidth


def _time_to_fit(
    remaining_bytes: float, bandwidth: float, dirty: float, policy: Policy
) -> float | None:
    """Sum of the rounds still to come, and the blackout at their end."""
    seconds = 0.0
    for _ in range(MAX_PREDICTED_ROUNDS):
        if _fits(remaining_bytes, bandwidth, policy):
            return seconds + FIXED_COST_S + remaining_bytes / bandwidth
        lasts = remaining_bytes / bandwidth
        seconds += lasts
        remaining_bytes = min(remaining_bytes * SHRINKS, dirty * lasts)
    return None


class _Say(Protocol):
    """The shape of decide()'s inner `verdict`."""

    def __call__(
        self, word: Verdict, reason: str, message: str, throttle: int | None = None
    ) -> Decision: ...


def decide(situation: Situation) -> Decision:
    """The verdict on the latest round (or on the passing of time between rounds)."""
    rounds, policy = situation.rounds, situation.policy
    guess = estimate(rounds, policy)

    def verdict(word: Verdict, reason: str, message: str, throttle: int | None = None) -> Decision:
        number = rounds[-1].number if rounds else 0
        return Decision(word, reason, message, number, situation.at_s, guess, throttle)

    if situation.postcopy_started:
        return verdict(Verdict.CONTINUE, "postcopy_started", "the guest is moving by postcopy")
    if situation.forced:
        return verdict(Verdict.SWITCH_OVER, "forced", "a client asked to switch over now")
    if situation.at_s >= situation.deadline_at_s:
        return verdict(
            Verdict.GIVE_UP, "deadline", f"not done within deadline_s = {policy.deadline_s:g}"
        )
    blackout = guess.predicted_blackout_s
    if blackout is not None and blackout <= policy.downtime_limit_s:
        return verdict(
            Verdict.SWITCH_OVER,
            "fits_downtime_limit",
            f"predicted blackout {blackout * 1000:.0f} ms fits the limit of "
            f"{policy.downtime_limit_s * 1000:.0f} ms",
        )
    if guess.converges is not False:
        reason = "converging" if guess.converges else "too_few_rounds"
        return verdict(Verdict.CONTINUE, reason, _forecast(guess, policy))
    return _not_converging(situation, guess, verdict)


def _not_converging(situation: Situation, guess: Estimate, verdict: _Say) -> Decision:
    policy, forecast = situation.policy, _forecast(guess, situation.policy)
    match policy.when_not_converging:
        case WhenNotConverging.GIVE_UP:
            return verdict(Verdict.GIVE_UP, "not_converging", f"{forecast}; policy: give up")
        case WhenNotConverging.POSTCOPY if situation.postcopy_possible:
            return verdict(
                Verdict.START_POSTCOPY, "not_converging", f"{forecast}; policy: postcopy"
            )
        case WhenNotConverging.THROTTLE:
            percent = throttle_for(guess, situation)
            if percent > situation.throttle_percent:
                return verdict(
                    Verdict.THROTTLE,
                    "not_converging",
                    f"{forecast}; throttling the vCPUs to {percent} %",
                    percent,
                )
            return verdict(
                Verdict.CONTINUE, "throttled", f"{forecast}; throttled at {percent} % already"
            )
        case _:
            return verdict(
                Verdict.CONTINUE, "waiting", f"{forecast}; policy: wait for the deadline"
            )


def throttle_for(guess: Estimate, situation: Situation) -> int:
    """The throttle (percent) that would make the rounds shrink, within the policy's maximum.

    The dirty rate seen is already slowed by the throttle in force, so the guest's own rate is
    D / (1 - p). When the computed step was not enough, ten points are added each time.
    """
    ceiling = situation.policy.max_throttle_percent
    now = situation.throttle_percent
    if not guess.dirty_bytes_per_s or not guess.bandwidth_bytes_per_s:
        return now
    own_rate = guess.dirty_bytes_per_s / (1 - now / 100)
    wanted = round(max(0.0, 100 * (1 - AIM * guess.bandwidth_bytes_per_s / own_rate)))
    return max(now, min(ceiling, max(wanted, now + 10, 20)))


def _forecast(guess: Estimate, policy: Policy) -> str:
    blackout = guess.predicted_blackout_s
    if blackout is None:
        return "no round is complete yet"
    text = (
        f"predicted blackout {blackout * 1000:.0f} ms, "
        f"limit {policy.downtime_limit_s * 1000:.0f} ms"
    )
    if guess.dirty_bytes_per_s is not None and guess.bandwidth_bytes_per_s:
        text += (
            f"; dirtying {guess.dirty_bytes_per_s / 2**20:.1f} MiB/s "
            f"against {guess.bandwidth_bytes_per_s / 2**20:.1f} MiB/s sent"
        )
    return text
