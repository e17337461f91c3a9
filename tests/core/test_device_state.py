"""The arcs of VFIO device states, against the kernel's rules derived another way."""

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrd.core.device_state import (
    RESET_ONLY,
    SAVING,
    DeviceState,
    NoWay,
    direct_arcs,
    fall_back,
    opens_session,
    supported_states,
    way,
)
from migrd.core.devices import MigrationFlag as Flag

S = DeviceState
ALL = frozenset(Flag)
DEVICES = [
    frozenset({Flag.STOP_COPY, *more})
    for more in ((), (Flag.P2P,), (Flag.PRE_COPY,), (Flag.P2P, Flag.PRE_COPY))
]
MOVES = list(itertools.product(DeviceState, DeviceState))

# What linux/vfio.h lists for a device with everything, one line a state.
HEADER = """
    RUNNING: RUNNING_P2P PRE_COPY
    RUNNING_P2P: RUNNING STOP PRE_COPY_P2P
    STOP: RUNNING_P2P STOP_COPY RESUMING
    STOP_COPY: STOP
    RESUMING: STOP
    PRE_COPY: RUNNING PRE_COPY_P2P
    PRE_COPY_P2P: RUNNING_P2P PRE_COPY STOP_COPY
"""
STEPS = {
    DeviceState[start.strip()]: [DeviceState[end] for end in ends.split()]
    for start, ends in (line.split(":") for line in HEADER.split("\n") if ":" in line)
}


def simple_ways(so_far: list[S], target: S) -> Iterator[list[S]]:
    """Every way without a repeat, shortest or not."""
    if so_far[-1] == target:
        yield so_far
        return
    for step in STEPS.get(so_far[-1], ()):
        if step not in so_far:
            yield from simple_ways([*so_far, step], target)


def kernel_ways(start: S, target: S) -> list[list[S]]:
    """By brute force: the shortest of those that pass through no saving state, except from saving
    to saving. Of a device with everything."""
    if start == S.STOP_COPY and target in (S.PRE_COPY, S.PRE_COPY_P2P):
        return []
    stays = start in SAVING and target in SAVING
    ways = [
        one for one in simple_ways([start], target) if stays or not SAVING.intersection(one[1:-1])
    ]
    return [one for one in ways if len(one) == min(map(len, ways))]


@pytest.mark.parametrize("flags", DEVICES, ids=lambda flags: "+".join(sorted(flags)))
def test_every_move_goes_the_way_that_the_kernel_takes(flags: frozenset[Flag]) -> None:
    """The kernel has one table, for all states, and steps over those that a device lacks."""
    states = supported_states(flags)
    for start, target in MOVES:
        ways = kernel_ways(start, target)
        possible = {start, target} <= states and S.ERROR not in (start, target) and ways
        if not possible:
            with pytest.raises(NoWay):
                way(start, target, flags)
        else:
            assert len(ways) == 1, "the shortest way is not the only one"
            expected = tuple(state for state in ways[0] if state in states)
            assert way(start, target, flags) == expected


@pytest.mark.parametrize("flags", DEVICES, ids=lambda flags: "+".join(sorted(flags)))
def test_an_arc_is_a_way_of_one_step(flags: frozenset[Flag]) -> None:
    arcs = {(arc.start, arc.end) for arc in direct_arcs(flags)}
    one_step = set()
    for start, target in MOVES:
        try:
            steps = way(start, target, flags)
        except NoWay:
            continue
        assert set(itertools.pairwise(steps)) <= arcs
        if len(steps) == 2:
            one_step.add((start, target))
    assert one_step == arcs


def test_a_device_without_stop_copy_can_only_run() -> None:
    for flags in (frozenset[Flag](), frozenset({Flag.P2P, Flag.PRE_COPY})):
        assert supported_states(flags) == {S.RUNNING, S.ERROR}
        assert direct_arcs(flags) == ()


def moves(flags: frozenset[Flag]) -> Iterator[tuple[S, S]]:
    for start, target in MOVES:
        try:
            way(start, target, flags)
        except NoWay:
            continue
        yield start, target


@pytest.mark.parametrize("flags", DEVICES, ids=lambda flags: "+".join(sorted(flags)))
def test_a_fall_back_is_reachable_from_wherever_the_move_stopped(flags: frozenset[Flag]) -> None:
    for start, target in moves(flags):
        back = fall_back(start, target, flags)
        if back is RESET_ONLY:
            continue
        assert back in supported_states(flags)
        for stopped_at in way(start, target, flags)[:-1]:
            assert not opens_session(stopped_at, back, flags), (start, target, stopped_at)


@pytest.mark.parametrize("flags", DEVICES, ids=lambda flags: "+".join(sorted(flags)))
def test_only_a_half_loaded_device_has_nothing_to_fall_back_to(flags: frozenset[Flag]) -> None:
    resets = {
        (start, target)
        for start, target in moves(flags)
        if fall_back(start, target, flags) is RESET_ONLY
    }
    assert resets == {(s, t) for s, t in moves(flags) if s == S.RESUMING != t}


@pytest.mark.parametrize("flags", DEVICES, ids=lambda flags: "+".join(sorted(flags)))
def test_a_failed_save_leaves_a_running_guest_running(flags: frozenset[Flag]) -> None:
    running = {S.RUNNING, S.RUNNING_P2P, S.PRE_COPY, S.PRE_COPY_P2P}
    for start, target in moves(flags):
        if start in running:
            assert fall_back(start, target, flags) in running
        if start in SAVING and target in SAVING:
            assert fall_back(start, target, flags) == start, "with its session"


@pytest.mark.parametrize("flags", DEVICES, ids=lambda flags: "+".join(sorted(flags)))
def test_a_session_is_opened_exactly_where_none_is_going_on(flags: frozenset[Flag]) -> None:
    for start, target in moves(flags):
        expected = (target in SAVING and start not in SAVING) or target == S.RESUMING != start
        assert opens_session(start, target, flags) == expected


@given(st.integers(min_value=0, max_value=2**32 - 1))
def test_any_number_that_a_driver_returns_is_a_state(number: int) -> None:
    state = DeviceState(number)
    assert state == number
    assert state == DeviceState(number)
    assert state.is_known == (number in set(S))
    assert str(number) in state.name or state.is_known


@given(st.integers(min_value=8, max_value=2**32 - 1), st.sampled_from(DeviceState))
def test_no_way_leads_to_or_from_an_unknown_state(number: int, known: S) -> None:
    for start, target in ((known, DeviceState(number)), (DeviceState(number), known)):
        with pytest.raises(NoWay, match=f"UNKNOWN_{number}"):
            way(start, target, ALL)


@pytest.mark.parametrize("number", [-1, 2**32])
def test_what_no_driver_can_return_is_no_state(number: int) -> None:
    with pytest.raises(ValueError, match="DeviceState"):
        DeviceState(number)
