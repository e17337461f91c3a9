"""The engine's settings as values; `daemon.py` fills them from the configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from migrd.core.rate_reading import RateMode
from migrd.core.tracking import TrackingPolicy
from migrd.engine.ports import PortRange, TlsIdentity


@dataclass(frozen=True)
class SamplingOptions:
    """How dirty rates are measured outside of migrations."""

    mode: RateMode | None = None
    """How QEMU measures what the guest's CPUs write; None: it is not asked."""
    interval_s: float = 30.0
    windows_s: tuple[float, ...] = (0.25, 1.0, 4.0)
    pages: int = 2048
    """So many pages of a guest are sampled."""
    budget_share: float = 0.01
    """Of one core, for all VMs together."""


@dataclass(frozen=True)
class EngineOptions:
    """Limits and deadlines. Every phase has one: nothing waits for ever without saying so."""

    host: str
    listen_host: str = "127.0.0.1"
    """Where an incoming QEMU listens for the guest."""
    ports: PortRange | None = None
    """Where an incoming QEMU may listen; None: any free port."""
    migration_hosts: Mapping[str, str] = field(default_factory=dict)
    """Destination -> address for the stream, where it is not the one that host names itself."""
    tls: TlsIdentity | None = None
    outgoing_slots: int = 2
    incoming_slots: int = 2
    preflight_deadline_s: float = 15.0
    prepare_deadline_s: float = 60.0
    switchover_deadline_s: float | None = None
    """None: twice the downtime limit and two seconds more."""
    grant_deadline_s: float = 30.0
    """Without an answer to GRANT for so long, the operator is called (and it is asked on)."""
    rollback_deadline_s: float = 30.0
    release_deadline_s: float = 60.0
    stall_s: float = 10.0
    """Not one byte moved for so long: the link is stalled, roll back."""
    receive_idle_s: float = 60.0
    loaded_idle_s: float = 120.0
    watch_interval_s: float = 1.0
    peer_interval_s: float = 5.0
    history: int = 4096
    """Events kept for replay."""
    queue: int = 1024
    """Events a slow reader may be behind."""
    peers: Mapping[str, str] = field(default_factory=dict)
    """Roster: host name -> URL, for people to see."""
    migrd_version: str = ""
    tracking_policy: TrackingPolicy = TrackingPolicy.AUTO
    """Where a request names none."""
    forbidden_tracking_policies: frozenset[TrackingPolicy] = frozenset()
    dma_sample_interval_s: float = 10.0
    dma_sample_budget_s: float = 0.02
    """Kernel time of one sample of one VM's devices."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    def switchover_s(self, downtime_limit_s: float) -> float:
        """Deadline of the switchover phase."""
        if self.switchover_deadline_s is not None:
            return self.switchover_deadline_s
        return 2 * downtime_limit_s + 2.0
