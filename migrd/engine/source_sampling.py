"""One source of one VM, measured again and again: one task.

    until due, or asked ──► in the way? ──► book the cost, wait ──► window, window, … ──► kept
          ▲                     └── look again in PAUSE_S                                   │
          └──────────────────────────── interval_s after it began ─────────────────────────┘

Nobody else waits for this task, and it waits for no other: what it needs of its VM may never come.
A migration ends it between two windows, and what it has found then is thrown away.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

import structlog

from migrd.core.rate_history import RateHistory
from migrd.core.rate_reading import RateReading, headline
from migrd.core.sampling_budget import SamplingBudget
from migrd.core.working_set import WorkingSet, fit
from migrd.engine.rate_source import RateSource
from migrd.engine.rate_views import RateSeen, SamplingState, TrackerRates, Trouble
from migrd.engine.world import World
from migrd.errors import MigrdError

T = TypeVar("T")

log = structlog.get_logger(__name__)

PAUSE_S: Final = 1.0
PATIENCE_S: Final = 30.0
"""A window that takes so much longer than it is long is given up."""
LEAST_GAP_S: Final = 5.0
"""Between two sets that somebody asked for."""
FIRST_COST_S: Final = 0.01
"""Booked for a set before one has been seen."""
NOT_OFFERED: Final = "not_offered"
REMEMBERS: Final = 0.3
"""Weight of the newest set's cost in what the next is expected to cost."""


class SourceSampling:
    """Measures `source` until cancelled; everything here belongs to the event loop's thread."""

    def __init__(
        self,
        vm: str,
        source: RateSource,
        history: RateHistory,
        budget: SamplingBudget,
        world: World,
        *,
        in_the_way: Callable[[], SamplingState | None],
        memory_bytes: Callable[[], int | None],
    ) -> None:
        """`in_the_way`: what keeps the VM from being measured now."""
        self.vm = vm
        self.source = source
        self.history = history
        self._budget = budget
        self._world = world
        self._in_the_way = in_the_way
        self._memory_bytes = memory_bytes
        self._woken = asyncio.Event()
        self.is_offered = True
        """False: this VM's process cannot be asked; it is looked at again, for it may change."""
        self._is_asked = False
        self._is_measuring = False
        self._begun_s: float | None = None
        self._ended_s: float | None = None
        self._waits_until_s = 0.0
        self._expected_s = FIRST_COST_S
        self._took_s = 0.0
        self._readings: tuple[RateReading, ...] = ()
        self._working_set: WorkingSet | None = None
        self._sampled_s: float | None = None
        self._cost_s: float | None = None
        self._interval_s: float | None = None
        self._sets = self._failures = 0
        self._trouble: Trouble | None = None

    # For clients ------------------------------------------------------------------------------

    def ask(self) -> tuple[bool, float]:
        """Measure soon, once however often it is asked; (is that new, seconds until it is over)."""
        is_new = not (self._is_asked or self._is_measuring)
        if not self._is_measuring:
            self._is_asked = True
            self._woken.set()
        now_s = self._world.clock.monotonic_s()
        soonest_s = max(self._asked_at_s(now_s), self._waits_until_s) - now_s
        return is_new, max(0.0, soonest_s) + self._took_s

    def view(self) -> TrackerRates:
        """As it is now."""
        age_s = sampled_wall_s = None
        if self._sampled_s is not None:
            age_s = self._world.clock.monotonic_s() - self._sampled_s
            sampled_wall_s = self._world.clock.wall_s() - age_s
        return TrackerRates(
            tracker=self.source.tracker,
            source=self.source.name,
            readings=self._readings,
            working_set=self._working_set,
            sampled_wall_s=sampled_wall_s,
            age_s=age_s,
            cost_s=self._cost_s,
            interval_s=self._interval_s,
            sets=self._sets,
            failures=self._failures,
            trouble=self._trouble,
        )

    # The task ---------------------------------------------------------------------------------

    async def run(self, first_after_s: float) -> None:
        """Runs until cancelled."""
        due_s = self._world.clock.monotonic_s() + first_after_s
        while True:
            await self._until(due_s)
            now_s = self._world.clock.monotonic_s()
            due_s = now_s + PAUSE_S
            if self._in_the_way() is not None:
                await asyncio.sleep(PAUSE_S)  # however often somebody asks
            elif await self._has_budget(now_s):
                due_s = self._begin() + self.source.interval_s
                await self._measure()

    async def _until(self, due_s: float) -> None:
        """Until it is due; somebody who asks makes that earlier, but not too early."""
        clock = self._world.clock
        while (left_s := self._due_s(due_s) - clock.monotonic_s()) > 0:
            self._woken.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._woken.wait()

    def _due_s(self, due_s: float) -> float:
        return min(due_s, self._asked_at_s(due_s)) if self._is_asked else due_s

    def _asked_at_s(self, otherwise_s: float) -> float:
        """The soonest that a wish can be granted."""
        if self._ended_s is None:
            return min(otherwise_s, self._world.clock.monotonic_s())
        return self._ended_s + LEAST_GAP_S

    async def _has_budget(self, now_s: float) -> bool:
        """Book a set, and wait for its turn; False: something came in the way meanwhile."""
        booked_s = self._expected_s
        wait_s = self._budget.book(booked_s, now_s)
        self._waits_until_s = now_s + wait_s
        try:
            await asyncio.sleep(wait_s)
            if self._in_the_way() is None:
                return True
        except asyncio.CancelledError:
            self._budget.settle(booked_s, 0.0)
            raise
        self._budget.settle(booked_s, 0.0)
        return False

    def _begin(self) -> float:
        now_s = self._world.clock.monotonic_s()
        if self._begun_s is not None:
            self._interval_s = now_s - self._begun_s
        self._begun_s = now_s
        self._is_asked = False
        return now_s

    async def _measure(self) -> None:
        booked_s, begun_s = self._expected_s, self._world.clock.monotonic_s()
        readings: list[RateReading] = []
        self._is_measuring = True
        try:
            outcome = await self._measure_all(readings)
        finally:
            self._is_measuring = False
            self._ended_s = self._world.clock.monotonic_s()
        cost_s = sum(reading.cost_s for reading in readings)
        began_s = time.thread_time()
        if outcome == NOT_OFFERED:
            self._budget.settle(booked_s, 0.0)
            return
        if outcome == "ok":
            self._took_s = self._ended_s - begun_s
            outcome = self._keep(readings, cost_s)
            ours_s = time.thread_time() - began_s
            self._expected_s += REMEMBERS * (cost_s + ours_s - self._expected_s)
            self._budget.settle(booked_s, cost_s + ours_s)
        self._tell(outcome, readings, cost_s)

    async def _measure_all(self, readings: list[RateReading]) -> str:
        """Adds each window's reading to `readings`; the outcome in a word."""
        try:
            for window_s in await self._in_time(self.source.windows(), 0.0):
                readings.append(await self._in_time(self.source.measure(window_s), window_s))
                if self._in_the_way() is not None:
                    return "interrupted"
        except TimeoutError:
            return self._fail("too_slow", f"not over {PATIENCE_S:g} s after its time")
        except MigrdError as exc:
            if self._in_the_way() is not None:
                return "interrupted"
            return self._fail(exc.code, exc.message)
        except Exception as exc:  # what is only looked at must not end the daemon
            why = f"{type(exc).__name__}: {exc}"
            log.error("measuring a dirty rate failed", vm=self.vm, cause=why)
            return self._fail("unexpected", why)
        self.is_offered = bool(readings)
        return "ok" if readings else NOT_OFFERED

    async def _in_time(self, doing: Awaitable[T], window_s: float) -> T:
        async with asyncio.timeout(window_s + PATIENCE_S):
            return await doing

    def _fail(self, code: str, message: str) -> str:
        self._failures += 1
        self._trouble = Trouble(code, message, self._world.clock.wall_s())
        log.debug("no dirty rate", vm=self.vm, source=self.source.name, cause=message)
        return "failed"

    def _keep(self, readings: Sequence[RateReading], cost_s: float) -> str:
        """The outcome: "ok", or "unknown" where no window found anything out."""
        self._sampled_s = self._ended_s
        self._readings = tuple(readings)
        self._working_set = fit(readings, total_bytes=self._memory_bytes())
        self._cost_s = cost_s
        self._sets += 1
        self._trouble = None
        best = headline(readings)
        if best is None or best.rate is None or best.rate.value is None:
            return "unknown"
        whole = self._working_set.set_bytes
        set_bytes = None if whole is None else whole.value
        self.history.add(self._world.clock.monotonic_s(), best.rate.value, set_bytes)
        return "ok"

    def _tell(self, outcome: str, readings: Sequence[RateReading], cost_s: float) -> None:
        best = headline(readings) if outcome == "ok" else None
        rate = None if best is None else best.rate
        found = [(each.dirty_bytes, each.page_size_bytes) for each in readings]
        self._world.observer.rate_sampled(
            RateSeen(
                self.vm,
                self.source.tracker,
                outcome,
                None if rate is None else rate.value,
                sum((figure.value or 0.0) / size for figure, size in found if figure is not None),
                cost_s,
                self._world.clock.wall_s(),
            )
        )
