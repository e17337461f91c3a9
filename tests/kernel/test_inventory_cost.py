"""What the inventory costs, as ratios in one run; the rest: `python -m tests.bench inventory`.

Processor time only, the least of several: other work on the machine hardly changes it.
"""

import time
from collections.abc import Callable, Iterator

import pytest

from migrd.kernel.host_scan import scan_again, scan_host
from migrd.kernel.probed import Answers, assemble, concerned
from tests.bench.inventory import bare_reads, large_tree
from tests.fakes.sysfs import FakeHost, bdf

FUNCTIONS = 1024


@pytest.fixture(scope="module")
def host() -> Iterator[FakeHost]:
    with large_tree(FUNCTIONS) as host:
        yield host


def least_cpu_s(work: Callable[[], object], times: int = 7) -> float:
    def once() -> float:
        began_s = time.process_time()
        work()
        return time.process_time() - began_s

    return min(once() for _ in range(times))


def test_a_full_scan_costs_little_more_than_its_reads(host: FakeHost) -> None:
    addresses = [bdf(number) for number in range(FUNCTIONS)]
    bare_s = least_cpu_s(lambda: bare_reads(host, addresses))
    ours_s = least_cpu_s(lambda: assemble(scan_host(host.roots), Answers()))
    assert ours_s < 5 * bare_s


def test_one_device_read_again_costs_a_small_part_of_a_full_scan(host: FakeHost) -> None:
    scan = scan_host(host.roots)
    inventory = assemble(scan, Answers())
    one = [bdf(77)]

    def again() -> None:
        now = scan_again(host.roots, scan, one)
        assemble(now, Answers(), previous=inventory, changed=concerned(one, scan, now))

    assert least_cpu_s(again) < least_cpu_s(lambda: scan_host(host.roots), 3) / 10
