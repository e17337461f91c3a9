"""A migration as it goes: statuses with the event that brings them, numbers at a measured pace.

    MIGRATION, STOP, RESUME ──► sample from the last numbers, at once ──┐
                     └──► wakes the poll                                ├──► bounded queue ──► newer
    query-migrate + query-status every 50 … 500 ms ──► full sample ─────┘

- A reply can be older than an event that overtook it: QEMU formed it, then its migration thread
  changed the status and told. A reply to a question asked before the last event therefore gives
  its numbers only; the status stays the event's, and the question is asked again at once.
- A MIGRATION_PASS (one dirty sync) wakes the poll, so that each round is seen right after its sync;
  passes that follow each other faster than a reply travels show as a jump of the count.
- VFIO_MIGRATION tells the state of one passthrough device; every change is a sample of its own.
- STOP, device states and the statuses of a switchover wake nothing: the event says all that
  matters, the guest stands still, and the answer would be formed with the lock that QEMU's own
  switchover needs.
- A slow reader loses no status and no round: only samples between the first and the last of the
  same status and round are dropped.
- While the monitor is blocked or gone there are no samples, and that says nothing at all about the
  migration. When it is back, the next answer is the truth; QEMU repeats no event.
- Pace: answers change every 100 ms in QEMU, so asking more often is useless, except near the end.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace

from migrd.core.facts import QemuStatus, RunState, TransferSample
from migrd.errors import VmmDied, VmmError, VmmUnreachable
from migrd.qemu.passthrough import with_device_state
from migrd.qemu.wire import QmpEvent

PACE_S = 0.1
NEAR_END_PACE_S = 0.05
IDLE_PACE_S = 0.5
BLOCKED_PACE_S = 0.5
LOST_PACE_S = 0.05
NEAR_END_S = 0.5
"""What is left would take no longer than this: look closely."""
BOUND = 512

_SHORT_LIVED = frozenset({QemuStatus.SETUP, QemuStatus.DEVICE, QemuStatus.CANCELLING})
_ON_THE_WAY = frozenset({QemuStatus.PRE_SWITCHOVER, QemuStatus.DEVICE})
_AT_REST = frozenset(
    {QemuStatus.NONE, QemuStatus.COMPLETED, QemuStatus.FAILED, QemuStatus.CANCELLED}
)

_NOTHING_KNOWN = (QemuStatus.UNKNOWN, RunState.UNKNOWN)

log = logging.getLogger(__name__)


class QemuFeed:
    """The engine's TransferFeed of one QEMU. `Machine.feed` opens it and owns its task."""

    def __init__(
        self,
        ask: Callable[[], Awaitable[TransferSample]],
        wait_dead: Callable[[], Awaitable[None]],
        *,
        bound: int = BOUND,
    ) -> None:
        self._ask = ask
        self._wait_dead = wait_dead
        self._bound = bound
        self._queue: deque[TransferSample] = deque()
        self._latest: TransferSample | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._kicked = asyncio.Event()
        self._status_events = 0
        self._run_events = 0
        self._death: VmmDied | None = None

    @property
    def latest(self) -> TransferSample | None:
        return self._latest

    async def newer(self, *, within_s: float) -> TransferSample | None:
        """The next sample in order; None when none came. Raises VmmDied after the last one."""
        if not self._queue and self._death is None:
            self._waiter = asyncio.get_running_loop().create_future()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await self._waiter
        if self._queue:
            return self._queue.popleft()
        if self._death is not None:
            raise self._death
        return None

    def take_event(self, event: QmpEvent) -> None:
        """Called from the monitor's reader for each event: publishes at once what it proves."""
        last = self._latest or TransferSample(event.received_s, *_NOTHING_KNOWN)
        if event.name == "MIGRATION":
            self._status_events += 1
            status = QemuStatus.of(event.data.get("status"))
            self._publish(replace(last, at_s=event.received_s, qemu_status=status))
            if status in _ON_THE_WAY:
                return
        elif event.name in {"STOP", "RESUME"}:
            self._run_events += 1
            self._publish(_run_change(last, event))
            if event.name == "STOP":
                return
        elif event.name == "VFIO_MIGRATION":
            states = with_device_state(last.device_states, event.data)
            self._publish(replace(last, at_s=event.received_s, device_states=states))
            return
        elif event.name not in {"MIGRATION_PASS", "SHUTDOWN", "GUEST_PANICKED", "SUSPEND"}:
            return
        self._kicked.set()

    def wake(self) -> None:
        """Ask now: something may have been missed."""
        self._kicked.set()

    async def run(self) -> None:
        """Poll until cancelled, or until the process is dead (which `newer` then raises)."""
        death = asyncio.ensure_future(self._wait_dead())
        polls = asyncio.create_task(self._poll_forever())
        try:
            await asyncio.wait({death, polls}, return_when=asyncio.FIRST_COMPLETED)
            if polls.done():
                polls.result()  # a bug: let it be seen
            await death
        except VmmDied as proof:
            self._death = proof
            self._notify()
        finally:
            for task in (death, polls):
                task.cancel()
            await asyncio.wait({death, polls})

    async def _poll_forever(self) -> None:
        while True:
            self._kicked.clear()
            pace_s = BLOCKED_PACE_S
            try:
                await self._poll()
                pace_s = _pace_s(self._latest)
            except VmmDied:
                return  # `run` waits for the same proof
            except VmmUnreachable as failure:
                log.debug("no sample: %s", failure)
                pace_s = LOST_PACE_S  # the next question waits for the connection by itself
            except VmmError as failure:
                log.debug("no sample: %s", failure)
            except Exception:  # a bug of ours must not leave a migration without eyes
                log.exception("no sample")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pace_s):
                    await self._kicked.wait()

    async def _poll(self) -> None:
        status_events, run_events = self._status_events, self._run_events
        sample = await self._ask()
        last = self._latest
        if last is not None and status_events != self._status_events:
            sample = replace(sample, qemu_status=last.qemu_status)
        if last is not None and run_events != self._run_events:
            sample = replace(sample, run_state=last.run_state)
        self._publish(sample)

    def _publish(self, sample: TransferSample) -> None:
        self._latest = sample
        queue = self._queue
        if len(queue) >= 2 and _key(queue[-1]) == _key(queue[-2]) == _key(sample):
            queue[-1] = sample
        else:
            if len(queue) >= self._bound:
                queue.popleft()
            queue.append(sample)
        self._notify()

    def _notify(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _run_change(last: TransferSample, event: QmpEvent) -> TransferSample:
    at_s = event.received_s
    if event.name == "RESUME":
        return replace(last, at_s=at_s, run_state=RunState.RUNNING, resumed_at_s=at_s)
    # not running for certain, but STOP does not say which of the stopped states it is
    return replace(last, at_s=at_s, run_state=RunState.UNKNOWN, stopped_at_s=at_s)


def _key(sample: TransferSample) -> tuple[object, ...]:
    """What may not be dropped from a queue: a change of any of these."""
    return (
        sample.qemu_status,
        sample.run_state,
        sample.qemu_dirty_sync_count,
        sample.stopped_at_s,
        sample.resumed_at_s,
        sample.device_states,
        sample.reset_devices,
    )


def _pace_s(sample: TransferSample | None) -> float:
    if sample is None or sample.qemu_status in _SHORT_LIVED:
        return NEAR_END_PACE_S
    if sample.qemu_status in _AT_REST:
        return IDLE_PACE_S
    remaining, bandwidth = sample.remaining_bytes, sample.bandwidth_bytes_per_s
    if sample.qemu_status is QemuStatus.ACTIVE and remaining is not None and bandwidth:
        return NEAR_END_PACE_S if remaining < bandwidth * NEAR_END_S else PACE_S
    return PACE_S
