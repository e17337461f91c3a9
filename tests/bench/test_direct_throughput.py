"""What a moved guest costs the daemons in memory; its speed is `python -m tests.bench direct`'s."""

from tests.bench import direct_throughput
from tests.bench.figures import Judge, Table


async def test_a_guest_of_sixteen_times_the_size_costs_the_daemons_no_more_memory() -> None:
    table = await direct_throughput.run(1, size_mib=16, largest_mib=512)
    peaks = [figure for figure in table.figures if figure.judge is Judge.MORE]
    assert len(peaks) == 2
    assert all(0 < figure.ours < 256 for figure in peaks)
    assert not Table(peaks).missed(), "\n" + table.text()
