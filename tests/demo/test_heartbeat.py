import asyncio
from functools import partial
from pathlib import Path

import pytest

from migrd.demo.proof import ProofFailed, SerialTap, heartbeats, prove_continuity
from tests.lab.bare_qemu import until


def line(sequence: int, *, errors: int = 0, ticks: int | None = None) -> bytes:
    ticks = sequence * 10 if ticks is None else ticks
    return b"H %08x %08x %08x %08x %08x\n" % (sequence, 0, errors, sequence * 100, ticks)


def tap(owner: str, *chunks: tuple[float, bytes]) -> SerialTap:
    made = SerialTap(owner)
    made.chunks.extend(chunks)
    return made


def beats(owner: str, first: int, last: int, *, start_s: float = 0.0) -> SerialTap:
    chunks = [(start_s + 0.01 * (n - first), line(n)) for n in range(first, last + 1)]
    return tap(owner, *chunks)


def test_a_move_without_loss_is_continuous_and_its_blackout_is_the_gap_less_one_interval() -> None:
    source = beats("source", 1, 20)  # the last at 0.19 s
    destination = beats("destination", 21, 40, start_s=0.19 + 0.01 + 0.035)
    proof = prove_continuity([source, destination], switches=1)
    assert (proof.first_sequence, proof.last_sequence, proof.heartbeats) == (1, 40, 40)
    assert proof.interval_s == pytest.approx(0.01)
    assert list(proof.blackouts_s) == pytest.approx([0.035])


def test_a_line_torn_across_the_switchover_is_one_heartbeat_of_the_destination() -> None:
    torn = line(3)
    source = tap("source", (0.0, b"B\nF\n" + line(1)), (0.01, line(2)), (0.02, torn[:13]))
    destination = tap("destination", (0.07, torn[13:]), (0.08, line(4)))
    found = heartbeats([source, destination])
    assert [(beat.sequence, beat.owner) for beat in found[2:]] == [
        (3, "destination"),
        (4, "destination"),
    ]
    proof = prove_continuity([source, destination], switches=1)
    assert list(proof.blackouts_s) == pytest.approx([0.06 - 0.01])


def test_one_stall_does_not_make_all_times_doubtful_but_it_is_told() -> None:
    source = beats("source", 1, 60)
    stalled = tap("source", *source.chunks, *beats("", 61, 62, start_s=0.59 + 0.5).chunks)
    proof = prove_continuity([stalled], switches=0)
    assert proof.largest_gap_s == pytest.approx(0.5)
    assert proof.jitter_s < 0.001


def test_several_moves_give_one_blackout_each() -> None:
    taps = [
        beats("a", 1, 10),
        beats("b", 11, 20, start_s=0.2),
        beats("a again", 21, 30, start_s=0.5),
    ]
    proof = prove_continuity(taps, switches=2)
    assert list(proof.blackouts_s) == pytest.approx([0.1, 0.2])


def test_a_lost_heartbeat_is_a_gap() -> None:
    with pytest.raises(ProofFailed, match="gap: heartbeat 12 on destination follows 10"):
        prove_continuity([beats("source", 1, 10), beats("destination", 12, 20)], switches=1)


def test_two_running_copies_are_a_repeat() -> None:
    with pytest.raises(ProofFailed, match=r"repeat: heartbeat 9 on destination .* ran twice"):
        prove_continuity([beats("source", 1, 10), beats("destination", 9, 20)], switches=1)


def test_a_source_that_goes_on_in_the_middle_of_a_line_is_noticed() -> None:
    source = tap("source", (0.0, line(1) + line(2) + b"H 000000"))
    destination = tap("destination", (0.1, line(3) + line(4)))
    with pytest.raises(ProofFailed, match="not a line of the guest, on destination"):
        prove_continuity([source, destination], switches=1)


def test_a_guest_that_did_not_move_does_not_pass_for_one_that_did() -> None:
    with pytest.raises(ProofFailed, match="moved 0 times, not 1: it was heard on source"):
        prove_continuity([beats("source", 1, 10), SerialTap("destination")], switches=1)


def test_a_page_the_guest_found_changed_fails_the_proof() -> None:
    source = tap("source", (0.0, line(1)), (0.01, line(2, errors=3)))
    with pytest.raises(ProofFailed, match="the guest found 3 pages changed"):
        prove_continuity([source], switches=0)


def test_a_clock_that_goes_back_fails_the_proof() -> None:
    source = tap("source", (0.0, line(1, ticks=50)), (0.01, line(2, ticks=49)))
    with pytest.raises(ProofFailed, match="clock went back"):
        prove_continuity([source], switches=0)


def test_a_tap_that_came_late_starts_with_the_first_whole_line() -> None:
    late = tap("source", (0.0, line(6)[20:] + line(7)), (0.01, line(8)))
    assert [beat.sequence for beat in heartbeats([late])] == [7, 8]


def test_silence_proves_nothing() -> None:
    with pytest.raises(ProofFailed, match="only 0 heartbeats"):
        prove_continuity([SerialTap("source")], switches=0)


async def test_a_growing_file_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "serial"
    growing = path.open("wb", buffering=0)
    seen = SerialTap("source")
    following = asyncio.create_task(seen.follow(path))

    async def has(count: int) -> bool:
        return len(heartbeats([seen])) == count

    for count in (1, 2, 3):
        growing.write(line(count))
        await until(partial(has, count), f"{count} lines are followed")
    assert seen.text() == line(1) + line(2) + line(3)
    growing.close()
    following.cancel()
    with pytest.raises(asyncio.CancelledError):
        await following
