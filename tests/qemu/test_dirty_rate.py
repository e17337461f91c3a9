"""calc-dirty-rate: what is asked of which QEMU, and that no answer is taken for what it is not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from migrd.core.rate_reading import (
    GIB,
    MeasuredRate,
    RateMode,
    RateOffer,
    RateReading,
    of_page_sampling,
)
from migrd.core.working_set import fit
from migrd.engine.threads import in_thread
from migrd.errors import VmmRefused, VmmTimedOut
from migrd.qemu.dirty_rate import OVERRUN_S, measure, offer
from migrd.qemu.schema import QmpSchema, read_schema
from migrd.qemu.wire import CommandRefused
from tests.fakes.virtual_time import VirtualTimeLoop
from tests.qemu.real import running_qemu

SAMPLING, BITMAP = RateMode.PAGE_SAMPLING, RateMode.DIRTY_BITMAP
OLD_TYPES: list[dict[str, Any]] = [
    {"name": "calc-dirty-rate", "meta-type": "command", "arg-type": "1"},
    {"name": "query-dirty-rate", "meta-type": "command", "arg-type": "0"},
    {"name": "0", "meta-type": "object", "members": []},
    {
        "name": "1",
        "meta-type": "object",
        "members": [
            {"name": "calc-time", "type": "int"},
            {"name": "sample-pages", "type": "int"},
            {"name": "mode", "type": "2"},
        ],
    },
    {"name": "2", "meta-type": "enum", "values": ["page-sampling", "dirty-ring", "dirty-bitmap"]},
]
NEW_TYPES = [
    *OLD_TYPES[:3],
    {
        **OLD_TYPES[3],
        "members": [*OLD_TYPES[3]["members"], {"name": "calc-time-unit", "type": "3"}],
    },
    OLD_TYPES[4],
    {"name": "3", "meta-type": "enum", "values": ["second", "millisecond"]},
]
OLD, NEW = read_schema(OLD_TYPES), read_schema(NEW_TYPES)


class FakeQemu:
    """The two commands, by QEMU's rules; `twist` may spoil the final answer."""

    def __init__(self, rate: object = 7, twist: Callable[[dict[str, Any]], Any] = dict) -> None:
        self.asked: list[tuple[str, Mapping[str, Any]]] = []
        self.rate, self.twist = rate, twist
        self.lag_s = 0.003
        self.kvm: object = {"enabled": True, "present": True}
        self._wanted: Mapping[str, Any] = {}
        self._ends_s = 0.0

    async def __call__(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        deadline_s: float | None = None,
    ) -> Any:
        del deadline_s
        given = dict(arguments or {})
        self.asked.append((command, given))
        await asyncio.sleep(0.0004)
        if command == "query-kvm":
            return self.kvm
        return self._begin(given) if command == "calc-dirty-rate" else self._look()

    def _begin(self, given: Mapping[str, Any]) -> Any:
        now_s = asyncio.get_running_loop().time()
        if now_s < self._ends_s:
            text = "the dirty rate is already being measured."
            raise CommandRefused("calc-dirty-rate", "GenericError", text)
        per_s = 1000 if given.get("calc-time-unit") == "millisecond" else 1
        self._wanted = given
        self._ends_s = now_s + given["calc-time"] / per_s + self.lag_s
        return {}

    def _look(self) -> Any:
        answer = {
            "status": "measuring",
            "start-time": 0,
            "sample-pages": 512,
            "mode": "page-sampling",
            **self._wanted,
        }
        if asyncio.get_running_loop().time() < self._ends_s:
            return answer
        return self.twist({**answer, "status": "measured", "dirty-rate": self.rate})

    @property
    def begun(self) -> Mapping[str, Any]:
        return next(given for command, given in self.asked if command == "calc-dirty-rate")


def run(qemu: FakeQemu, schema: QmpSchema, window_s: float, mode: RateMode) -> MeasuredRate:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(measure(qemu, schema, window_s, mode, 1024))


def test_windows_are_what_the_schema_takes_and_not_what_the_version_says() -> None:
    assert offer(OLD) == RateOffer(frozenset(RateMode), 1.0, 1.0, 60)
    assert offer(NEW) == RateOffer(frozenset(RateMode), 0.001, 0.05, 60)
    assert offer(read_schema([])).modes == frozenset()
    assert offer(OLD).windows([0.25, 1.0, 4.0]) == (1.0, 2.0, 4.0)
    assert offer(NEW).windows([4.0, 0.25, 1.0]) == (0.25, 1.0, 4.0)
    assert offer(NEW).windows([0.01, 0.02, 90.0]) == pytest.approx((0.05, 0.051))


def test_an_old_qemu_is_asked_in_seconds_and_a_new_one_in_milliseconds() -> None:
    old, new = FakeQemu(), FakeQemu()
    assert run(old, OLD, 2.0, SAMPLING).mib_per_s == 7
    assert run(new, NEW, 0.25, SAMPLING).window_s == 0.25
    assert old.begun == {"calc-time": 2, "sample-pages": 1024, "mode": "page-sampling"}
    assert (new.begun["calc-time"], new.begun["calc-time-unit"]) == (250, "millisecond")
    assert new.asked[-1] == ("query-dirty-rate", {"calc-time-unit": "millisecond"})


def test_a_measurement_is_not_asked_about_before_its_time_is_over_nor_much_later() -> None:
    quick, slow = FakeQemu(), FakeQemu()
    slow.lag_s = 3.0
    found = run(quick, NEW, 4.0, SAMPLING)
    assert len(quick.asked) <= 4
    assert 0.003 <= found.overrun_s <= 0.012
    found = run(slow, NEW, 4.0, SAMPLING)
    assert 3.0 <= found.overrun_s <= 3.3
    assert len(slow.asked) < 25


def test_how_many_pages_were_sampled_is_what_qemu_says() -> None:
    assert run(FakeQemu(), NEW, 1.0, SAMPLING).pages_per_gib == 1024
    fewer = FakeQemu(twist=lambda answer: {**answer, "sample-pages": 128})
    assert run(fewer, NEW, 1.0, SAMPLING).pages_per_gib == 128
    bitmap = FakeQemu(twist=lambda answer: {**answer, "sample-pages": 0})
    assert run(bitmap, NEW, 1.0, BITMAP).pages_per_gib is None
    assert "sample-pages" not in bitmap.begun


@pytest.mark.parametrize("kvm", [{"enabled": False, "present": True}, {}, None, {"enabled": "yes"}])
def test_a_guest_that_is_not_known_to_run_by_kvm_is_never_measured_by_dirty_bitmap(
    kvm: object,
) -> None:
    """It would kill it."""
    qemu = FakeQemu()
    qemu.kvm = kvm
    with pytest.raises(VmmRefused) as refused:
        run(qemu, NEW, 1.0, BITMAP)
    assert refused.value.code == "rate_needs_kvm"
    assert [command for command, _ in qemu.asked] == ["query-kvm"]


def test_a_measurement_that_goes_on_already_is_an_answer_of_its_own() -> None:
    qemu = FakeQemu()
    qemu._ends_s = 1e9
    with pytest.raises(VmmRefused) as refused:
        run(qemu, NEW, 1.0, SAMPLING)
    assert refused.value.code == "rate_busy"


def test_one_that_never_ends_is_given_up() -> None:
    qemu = FakeQemu()
    qemu.lag_s = 1e9
    with pytest.raises(VmmTimedOut):
        run(qemu, NEW, 1.0, SAMPLING)
    assert len(qemu.asked) < OVERRUN_S / 0.25 + 15


@pytest.mark.parametrize("rate", [-1, None, "18", 1.5, True, [18], {}, 1 << 62])
def test_what_is_no_rate_is_not_taken_for_one(rate: object) -> None:
    with pytest.raises(VmmRefused) as refused:
        run(FakeQemu(rate), NEW, 1.0, SAMPLING)
    assert refused.value.code == "rate_not_understood"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (None, VmmTimedOut),
        ([], VmmTimedOut),
        ("measured", VmmTimedOut),
        ({"status": "of a new kind"}, VmmTimedOut),
        ({"status": "measured"}, VmmRefused),
        ({"status": "measured", "dirty-rate": 5, "calc-time": "1000"}, VmmRefused),
        ({"status": "measured", "dirty-rate": 5, "calc-time": 60}, VmmRefused),
        ({"status": "measured", "dirty-rate": 5, "calc-time": 60_000}, VmmRefused),
        (
            {"status": "measured", "dirty-rate": 5, "calc-time": 1000, "mode": "dirty-ring"},
            VmmRefused,
        ),
    ],
)
def test_garbage_is_an_error_that_the_engine_knows(answer: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        run(FakeQemu(twist=lambda _: answer), NEW, 1.0, SAMPLING)


def test_a_window_is_as_long_as_qemu_says_it_was() -> None:
    """On a busy host it wakes up late, and divides by the time that has really passed."""
    late = FakeQemu(twist=lambda answer: {**answer, "calc-time": 1004})
    assert run(late, NEW, 1.0, SAMPLING).window_s == pytest.approx(1.004)
    late = FakeQemu(twist=lambda answer: {**answer, "calc-time": 3})
    assert run(late, OLD, 2.0, SAMPLING).window_s == 3


def test_the_first_look_may_find_that_nothing_has_begun() -> None:
    answers = iter([{"status": "unstarted", "calc-time": 0}])
    qemu = FakeQemu(twist=lambda answer: next(answers, answer))
    assert run(qemu, NEW, 1.0, SAMPLING).mib_per_s == 7


# ---------------------------------------------------------------------------------- real QEMUs

PAGES_PER_S, SET_PAGES = 5000, 8192
SLOW_HOST = 4
"""On a busy machine the guest falls behind its pace."""


@pytest.mark.timeout(120)
async def test_real_qemus_measure_the_lab_guest(
    qemu_binary: Path, short_tmp_path: Path, lab_guest: Callable[..., Path]
) -> None:
    """It writes 5000 pages a second, one after the other, round and round over 32 MiB."""
    rom = await in_thread(
        lab_guest, working_set_pages=SET_PAGES, pages_per_s=PAGES_PER_S, noise=True
    )
    more = ("-m", "256", "-bios", str(rom))
    async with running_qemu(qemu_binary, short_tmp_path, *more) as qemu:
        machine = qemu.machine
        await machine.run_guest()
        await asyncio.sleep(1.5)
        found = await machine.rate_offer()
        assert SAMPLING in found.modes
        readings = []
        for window_s in found.windows([0.25, 1.0, 4.0]):
            measured = await machine.measure_rate(window_s, SAMPLING, pages_per_gib=4096)
            assert window_s <= measured.window_s < 2 * window_s
            assert measured.pages_per_gib == 4096
            figure = of_page_sampling(
                measured.mib_per_s, window_s=window_s, samples=1024, total_bytes=GIB // 4
            )
            truth = min(PAGES_PER_S * window_s, SET_PAGES) * 4096
            assert figure.high is not None
            assert figure.low / 2 < truth < SLOW_HOST * figure.high, (measured, figure)
            readings.append(RateReading(measured.window_s, 4096, figure))
        model = fit(readings, total_bytes=GIB // 4)
        first, whole = model.first_bytes_per_s, model.set_bytes
        assert first is not None
        assert whole is not None
        assert whole.high is not None
        assert first.low / 2 < PAGES_PER_S * 4096
        assert whole.low / 2 < SET_PAGES * 4096 < SLOW_HOST * whole.high
        with pytest.raises(VmmRefused) as refused:
            await machine.measure_rate(1.0, BITMAP, pages_per_gib=512)
        assert refused.value.code == "rate_needs_kvm"


@pytest.mark.timeout(120)
async def test_real_qemus_refuse_a_second_measurement(
    qemu_binary: Path, short_tmp_path: Path
) -> None:
    async with running_qemu(qemu_binary, short_tmp_path) as qemu:
        first = asyncio.create_task(qemu.machine.measure_rate(2.0, SAMPLING, pages_per_gib=512))
        await asyncio.sleep(0.5)
        with pytest.raises(VmmRefused) as refused:
            await qemu.machine.measure_rate(1.0, SAMPLING, pages_per_gib=512)
        assert refused.value.code == "rate_busy"
        assert (await first).mib_per_s == 0, "a stopped guest writes nothing"
