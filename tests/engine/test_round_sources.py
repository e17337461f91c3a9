"""What each source told in a round, from the sample to the journal, the API and the metrics."""

from __future__ import annotations

from dataclasses import asdict

import orjson

from migrd.api.models_progress import Round as WireRound
from migrd.core.facts import QemuStatus, Round, RunState, TransferSample
from migrd.core.harvest_round import ReadOutcome, SourceRead, Tracker
from migrd.engine.observations import as_round
from migrd.engine.rounds import RoundCounter
from migrd.metrics import Metrics

READS = (
    SourceRead("ram", Tracker.PROCESS, 120, 4096, 0.25, dirty_pages_per_s=60.0),
    SourceRead("nic", Tracker.DEVICE, 512, 2 << 20, 0.5, ReadOutcome.MARKED_ALL, "it was reset"),
)


def sample(at_s: float, count: int, sources: tuple[SourceRead, ...] = ()) -> TransferSample:
    return TransferSample(
        at_s,
        QemuStatus.ACTIVE,
        RunState.RUNNING,
        remaining_bytes=4096,
        transferred_bytes=count << 20,
        dirty_pages_per_s=10.0,
        page_size_bytes=4096,
        qemu_dirty_sync_count=count,
        sources=sources,
    )


def rounds() -> list[Round]:
    counter = RoundCounter(0)
    assert not counter.observe(sample(1.0, 2))
    return list(counter.observe(sample(3.0, 4, READS)))


def test_the_last_round_of_a_sample_has_what_the_sources_told() -> None:
    assert [one.sources for one in rounds()] == [(), READS]


def test_the_journal_gives_back_what_it_was_given() -> None:
    for one in rounds():
        assert as_round(orjson.loads(orjson.dumps(asdict(one)))) == one
    kept = asdict(rounds()[0])
    del kept["sources"]  # as an older migrd has written it
    assert as_round(kept) == rounds()[0]


def test_the_api_shows_each_source() -> None:
    ram, nic = WireRound.of(rounds()[1], 0.0).sources
    assert (ram.source, ram.tracker, ram.dirty_pages, ram.duration_ms) == (
        "ram",
        "pagemap",
        120,
        250,
    )
    assert (ram.outcome, ram.reason, ram.amplification) == ("read", None, 1.0)
    assert (nic.outcome, nic.reason, nic.amplification) == ("marked_all", "it was reset", 512.0)


def test_the_metrics_count_each_source_and_how_it_ended() -> None:
    metrics = Metrics()
    metrics.round_recorded("web", rounds()[1])

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, labels)

    rounds_total = "migrd_harvest_rounds_total"
    assert value(rounds_total, tracker="pagemap", outcome="ok") == 1
    assert value(rounds_total, tracker="device", outcome="failed") == 1
    assert value(rounds_total, tracker="qemu", outcome="ok") is None
    assert value("migrd_harvest_duration_seconds_sum", tracker="device") == 0.5
