"""The figures of a transfer away: what was decided, what was seen, and what that foretells."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, replace

from migrd.core.device_state import DeviceState
from migrd.core.facts import TransferAddress, TransferSample, TransferSettings
from migrd.core.harvest_round import HarvestRound
from migrd.core.memory_map import PAGE_BYTES
from migrd.direct.sender import Progress, Sent
from migrd.direct.stream_limits import StreamLimits

WORTH_MEASURING_BYTES = 1 << 20
"""What took less says more of the connection's latency than of its bandwidth."""

DeviceStates = Mapping[str, DeviceState | None]


@dataclass(frozen=True)
class Road:
    """Where the guest goes, and how."""

    address: TransferAddress
    settings: TransferSettings
    tls: ssl.SSLContext | None
    channels: int
    stream: StreamLimits


@dataclass
class Limits:
    """As they are now; they change while it goes on."""

    downtime_s: float
    bandwidth_bytes_per_s: int
    """0: none."""
    assumed_bandwidth_bytes_per_s: int | None = None
    """For the switchover, where the engine knows better than the last measurement."""


@dataclass
class Figures:
    """What has been seen so far. Times are time.monotonic()."""

    began_s: float
    setup_s: float | None = None
    rounds: int = 0
    last_round: HarvestRound | None = None
    pending_pages: int = 0
    bandwidth_bytes_per_s: float | None = None
    """Over the last round that was worth measuring."""
    device_bytes: int = 0
    device_seconds: float = 0.0
    """What the devices would take to send the rest of their state."""
    throttle_percent: int = 0
    stopped_at_s: float | None = None
    resumed_at_s: float | None = None
    ended_s: float | None = None

    def note_sent(self, sent: Sent) -> bool:
        """Whether the bandwidth is known better now."""
        is_worth = sent.bytes_on_wire >= WORTH_MEASURING_BYTES or self.bandwidth_bytes_per_s is None
        if sent.took_s <= 0 or not is_worth:
            return False
        self.bandwidth_bytes_per_s = sent.bytes_on_wire / sent.took_s
        return True

    def note_progress(self, progress: Progress) -> None:
        """In the first round, which may be long, its own pace will do to begin with."""
        if self.rounds == 1 and progress.transferred_bytes >= WORTH_MEASURING_BYTES:
            self.bandwidth_bytes_per_s = progress.bandwidth_bytes_per_s

    def blackout_s(self, pages: int, limits: Limits) -> float | None:
        """What the transfer itself would take with so much left; None: nothing was measured."""
        bandwidth = limits.assumed_bandwidth_bytes_per_s or self.bandwidth_bytes_per_s
        if bandwidth is None:
            return None
        return pages * PAGE_BYTES / max(1.0, bandwidth) + self.device_seconds

    def in_numbers(
        self,
        sample: TransferSample,
        progress: Progress,
        limits: Limits,
        memory_bytes: int,
        device_states: DeviceStates | None,
    ) -> TransferSample:
        """The sample with all that can be counted."""
        pending = max(self.pending_pages, progress.remaining_pages)
        last, stopped_s, ended_s = self.last_round, self.stopped_at_s, self.ended_s
        has_stopped = stopped_s is not None and ended_s is not None
        return replace(
            sample,
            total_bytes=memory_bytes,
            remaining_bytes=pending * PAGE_BYTES,
            transferred_bytes=progress.transferred_bytes,
            dirty_pages_per_s=None if last is None else last.dirty_pages_per_s,
            page_size_bytes=PAGE_BYTES,
            qemu_dirty_sync_count=self.rounds,
            bandwidth_bytes_per_s=progress.bandwidth_bytes_per_s,
            expected_downtime_s=self.blackout_s(pending, limits),
            downtime_s=(ended_s or 0.0) - (stopped_s or 0.0) if has_stopped else None,
            setup_time_s=self.setup_s,
            total_time_s=(ended_s or sample.at_s) - self.began_s,
            throttle_percent=self.throttle_percent,
            device_transferred_bytes=self.device_bytes if device_states is not None else None,
            device_states=_words(device_states or {}),
            sources=() if last is None else last.sources,
        )


def _words(states: DeviceStates) -> tuple[tuple[str, str], ...]:
    return tuple(
        (id_, "unknown" if state is None else state.name.lower().replace("_", "-"))
        for id_, state in sorted(states.items())
    )
