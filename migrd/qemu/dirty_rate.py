"""calc-dirty-rate: how fast a guest's CPUs write, measured by QEMU outside of migrations.

    calc-dirty-rate ─► "unstarted" ─► "measuring" … window … (hashing) ─► "measured": dirty-rate

The command only begins; `query-dirty-rate` is asked when the window is over, then ever less often.
What differs between QEMUs is found in the schema: windows are whole seconds (1 to 60), or with
`calc-time-unit` milliseconds (50 ms to 60 s). The rate is whole MiB/s, rounded down, everywhere.

Traps (seen on QEMU 7.2 and 10.0; qapi/migration.json, migration/dirtyrate.c):
- `dirty-bitmap` under TCG ends a QEMU 7.2 by a segmentation fault, and reports 0 on 10.0. Who is
  not known to run by KVM is never asked for it. It also write-protects the guest's memory: the
  first write to each page is slower for it.
- One measurement at a time: a second is refused while the first goes on, whoever began it.
- A migration does not keep QEMU from measuring; what it measures then is the migration's own.
- A window may last longer than it was to (a busy host): `calc-time` then says how long it was, and
  the rate is that of the longer one.
- A new measurement forgets the old figure, so one that is "measured" is ours, unless somebody else
  has begun another meanwhile: then its mode, or a window that is too short or far too long, tell.
- The answer for milliseconds says `calc-time: 0` when it is asked for in seconds.
- A stopped guest is measured too: 0.
"""

import asyncio
from typing import Final

from migrd.core.rate_reading import MeasuredRate, RateMode, RateOffer
from migrd.errors import VmmRefused, VmmTimedOut
from migrd.qemu.preparation import Ask
from migrd.qemu.schema import QmpSchema
from migrd.qemu.wire import Arguments, CommandRefused, json_object

MILLISECOND: Final = "millisecond"
LEAST_MS: Final = 50
MOST_S: Final = 60
OVERRUN_S: Final = 10.0
"""So long after the window's end the figure is waited for: hashing a terabyte takes seconds."""
FIRST_PAUSE_S: Final = 0.002
LONGEST_PAUSE_S: Final = 0.25
LARGEST_MIB_PER_S: Final = 1 << 40
"""No memory is written so fast: such a figure is none."""


def offer(schema: QmpSchema) -> RateOffer:
    """What this QEMU can measure."""
    if not {"calc-dirty-rate", "query-dirty-rate"} <= schema.commands:
        return RateOffer()
    words = schema.dirty_rate_modes or {RateMode.PAGE_SAMPLING.value}
    modes = frozenset(mode for mode in RateMode if mode.value in words)
    if MILLISECOND in schema.dirty_rate_units:
        return RateOffer(modes, step_s=0.001, least_s=LEAST_MS / 1000, most_s=MOST_S)
    return RateOffer(modes, step_s=1.0, least_s=1.0, most_s=MOST_S)


async def measure(
    ask: Ask, schema: QmpSchema, window_s: float, mode: RateMode, pages_per_gib: int
) -> MeasuredRate:
    """One measurement; see `engine.ports.Vmm.measure_rate`."""
    if mode not in offer(schema).modes:
        raise VmmRefused(f"this QEMU does not measure by {mode.value}", code="rate_mode_missing")
    if mode is RateMode.DIRTY_BITMAP:
        await _check_kvm(ask)
    unit, calc_time = _window(schema, window_s)
    wanted: dict[str, object] = {"calc-time": calc_time, **unit}
    if mode is RateMode.PAGE_SAMPLING and "sample-pages" in schema.dirty_rate_arguments:
        wanted["sample-pages"] = pages_per_gib
    if "mode" in schema.dirty_rate_arguments:
        wanted["mode"] = mode.value
    loop = asyncio.get_running_loop()
    try:
        await ask("calc-dirty-rate", wanted)
    except CommandRefused as refusal:
        raise VmmRefused(refusal.message, code="rate_busy") from refusal
    ends_s = loop.time() + window_s
    answer = await _until_measured(ask, unit, ends_s)
    overrun_s = max(0.0, loop.time() - ends_s)
    return _read(answer, wanted, window_s, overrun_s)


async def _check_kvm(ask: Ask) -> None:
    try:
        answer = json_object(await ask("query-kvm"))
    except CommandRefused:
        answer = {}  # built without it
    if answer.get("enabled") is not True:
        text = "only a guest that runs by KVM can be measured by dirty-bitmap"
        raise VmmRefused(text, code="rate_needs_kvm")


def _window(schema: QmpSchema, window_s: float) -> tuple[Arguments, int]:
    if MILLISECOND in schema.dirty_rate_units:
        return {"calc-time-unit": MILLISECOND}, max(LEAST_MS, round(window_s * 1000))
    return {}, max(1, round(window_s))


async def _until_measured(ask: Ask, unit: Arguments, ends_s: float) -> dict[str, object]:
    loop, pause_s = asyncio.get_running_loop(), FIRST_PAUSE_S
    await asyncio.sleep(ends_s - loop.time())
    while True:
        answer = json_object(await ask("query-dirty-rate", unit))
        if answer.get("status") == "measured":
            return answer
        if loop.time() - ends_s >= OVERRUN_S:
            text = f"the dirty rate was not measured {OVERRUN_S:g} s after its time was over"
            raise VmmTimedOut(text, code="rate_not_measured")
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _read(
    answer: dict[str, object], wanted: Arguments, window_s: float, overrun_s: float
) -> MeasuredRate:
    """Raises VmmRefused for what is no figure, or not ours."""
    mode = wanted.get("mode", RateMode.PAGE_SAMPLING.value)
    real_s = _real_window_s(answer.get("calc-time"), wanted, window_s)
    if real_s is None or answer.get("mode", mode) != mode:
        raise VmmRefused("somebody else has measured meanwhile", code="rate_busy")
    rate = _whole(answer.get("dirty-rate"))
    if rate is None or not 0 <= rate < LARGEST_MIB_PER_S:
        text = f"QEMU measured a dirty rate of {answer.get('dirty-rate')!r:.40} MiB/s"
        raise VmmRefused(text, code="rate_not_understood")
    if mode != RateMode.PAGE_SAMPLING.value:
        return MeasuredRate(rate, real_s, None, overrun_s)
    sampled = _whole(answer.get("sample-pages")) or _whole(wanted.get("sample-pages"))
    if sampled is None or sampled <= 0:
        raise VmmRefused("QEMU does not say how many pages it sampled", code="rate_not_understood")
    return MeasuredRate(rate, real_s, sampled, overrun_s)


def _real_window_s(told: object, wanted: Arguments, window_s: float) -> float | None:
    """How long the window was; None: it is not the one that was asked for."""
    calc_time, asked = _whole(told), _whole(wanted["calc-time"])
    if calc_time is None or asked is None or calc_time < asked:
        return None
    real_s = window_s * calc_time / asked
    return real_s if real_s <= window_s + OVERRUN_S else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
