"""No order of devices and no partition of them beats the plan, in the model of QEMU.

All devices here are known and may migrate with P2P, so containers do not touch each other: what
QEMU makes of one depends on its own devices, their order, and which of them are forced (seen to be
so for up to three devices, over the whole VM). So a container is tried once for each sequence of
classes, in every order and with every choice of enable-migration; a VM is as bad as its worst part;
and the best over all partitions of a multiset of classes is found from those.

An arrangement counts for what it comes to whether or not one IOMMU instance accepts the plain page
table of another: what is only good if it does (H1 put to use) is not good.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import combinations_with_replacement, permutations, product

import pytest

from migrd.core.tracking import TrackingPolicy, VmDevice
from tests.core.qemu_vfio_model import Given, Outcome, StartFails, worst_outcome
from tests.core.tracking_cases import (
    NO,
    YES,
    both,
    by_iommu,
    by_log,
    by_none,
    device,
    launched,
    plan,
    truth_of,
)

# One letter for each class: Both, Iommu, Log, None; small: an emulated mdev.
CLASSES = {
    "B": Given("", cap=True, log=True, instance="iommu0"),
    "I": Given("", cap=True, instance="iommu0"),
    "L": Given("", log=True, instance="iommu9"),
    "N": Given("", instance="iommu9"),
    "l": Given("", log=True, is_mdev=True),
    "n": Given("", is_mdev=True),
}
Best = tuple[int, int]
"""Rank of the outcome, number of iommufd objects; smaller is better."""


def made(letters: str) -> list[VmDevice]:
    makers = {"B": both, "I": by_iommu, "L": by_log, "N": by_none}
    return [
        makers[letter](f"{letter}{n}")
        if letter in makers
        else device(f"{letter}{n}", log=YES if letter == "l" else NO, mdev=True)
        for n, letter in enumerate(letters)
    ]


@cache
def of_container(letters: str, forced: tuple[bool, ...]) -> Outcome | None:
    """None: QEMU does not start."""
    given = [
        Given(
            f"{n}",
            cap=CLASSES[letter].cap,
            log=CLASSES[letter].log,
            is_mdev=CLASSES[letter].is_mdev,
            instance=CLASSES[letter].instance,
            enable_migration="on" if on else "auto",
        )
        for n, (letter, on) in enumerate(zip(letters, forced, strict=True))
    ]
    try:
        return worst_outcome(given)
    except StartFails:
        return None


@cache
def best_container(letters: str) -> int:
    """Over all orders and all choices of whom to force (only what nothing may track: for others
    the choice changes nothing that helps). `letters` is sorted."""
    outcomes = {
        of_container("".join(order), forced)
        for order in set(permutations(letters))
        for forced in product(*((False, True) if x in "Nn" else (False,) for x in order))
    }
    return min(outcome.rank for outcome in outcomes if outcome is not None)


@cache
def best(letters: str) -> Best:
    """Over all partitions: the outcome first, then as few objects as possible."""
    if not letters:
        return 0, 0
    return min(
        (max(best_container(first), rank), 1 + objects)
        for first, rest in splits(letters)
        for rank, objects in [best(rest)]
    )


def splits(letters: str) -> Iterator[tuple[str, str]]:
    """A first part that holds the first letter, and what is left; each multiset once."""
    head, tail = letters[0], Counter(letters[1:])
    kinds = sorted(tail)
    for taken in product(*(range(tail[kind] + 1) for kind in kinds)):
        first = head + "".join(kind * n for kind, n in zip(kinds, taken, strict=True))
        rest = "".join(kind * (tail[kind] - n) for kind, n in zip(kinds, taken, strict=True))
        yield "".join(sorted(first)), rest


def of_plan(letters: str, policy: TrackingPolicy) -> Best:
    devices = made(letters)
    found = plan(*devices, policy=policy)
    given = launched(found, {one.id: truth_of(one) for one in devices})
    return worst_outcome(given).rank, len(found.iommufds)


def multisets(alphabet: str, sizes: range) -> Iterator[str]:
    for size in sizes:
        for letters in combinations_with_replacement(sorted(alphabet), size):
            yield "".join(letters)


@pytest.mark.parametrize("policy", [TrackingPolicy.AUTO, TrackingPolicy.ALWAYS])
def test_no_order_and_no_partition_of_up_to_six_devices_beats_the_plan(
    policy: TrackingPolicy,
) -> None:
    tried = list(multisets("BILN", range(1, 7)))
    assert len(tried) == 209
    assert [letters for letters in tried if of_plan(letters, policy) != best(letters)] == []


def test_nor_with_emulated_mdevs_among_up_to_four() -> None:
    for letters in multisets("BILNln", range(1, 5)):
        assert of_plan(letters, TrackingPolicy.AUTO) == best(letters), letters


def test_nor_does_any_order_where_the_vm_may_have_one_iommufd_object() -> None:
    for letters in multisets("BILNln", range(1, 5)):
        devices = made(letters)
        found = plan(*devices, max_iommufds=1)
        if found.refused:
            assert set(letters) & {"L", "l"}
            assert "I" in letters
            continue
        given = launched(found, {one.id: truth_of(one) for one in devices})
        assert worst_outcome(given).rank == best_container("".join(sorted(letters))), letters


def whole_vm(letters: str) -> int:
    """The best outcome, each VM tried as a whole: orders, partitions, forces, nothing shared."""
    found = []
    for order in set(permutations(letters)):
        for homes in product(range(len(order)), repeat=len(order)):
            for forced in product((False, True), repeat=len(order)):
                given = [
                    Given(
                        f"{n}",
                        cap=CLASSES[x].cap,
                        log=CLASSES[x].log,
                        is_mdev=CLASSES[x].is_mdev,
                        instance=CLASSES[x].instance,
                        container=f"iommufd{homes[n]}",
                        enable_migration="on" if forced[n] else "auto",
                    )
                    for n, x in enumerate(order)
                ]
                try:
                    found.append(worst_outcome(given).rank)
                except StartFails:
                    continue
    return min(found)


def test_containers_do_not_touch_each_other_so_trying_them_one_by_one_tries_all() -> None:
    for letters in multisets("BILNln", range(1, 4)):
        assert whole_vm(letters) == best(letters)[0], letters
