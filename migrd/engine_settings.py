"""What the engine and the arbiter are given, out of the configuration: the units and names of one
in those of the other.
"""

import migrd
from migrd.arbiter.access import AccessFiles
from migrd.arbiter.arbiter import EtcdOptions
from migrd.config import QemuSampling, Settings, Tls
from migrd.core.rate_reading import RateMode
from migrd.engine.options import EngineOptions, SamplingOptions
from migrd.engine.ports import TlsIdentity


def engine_options(settings: Settings) -> EngineOptions:
    """The engine's part of the configuration."""
    migration = settings.migration
    tls = None
    if migration.tls is Tls.REQUIRED and migration.tls_dir is not None:
        tls = TlsIdentity(str(migration.tls_dir))
    return EngineOptions(
        host=settings.host.name.lower(),
        listen_host=migration.listen_host,
        ports=migration.port_range,
        migration_hosts={
            name.lower(): entry.migration_host
            for name, entry in settings.peers.items()
            if entry.migration_host is not None
        },
        tls=tls,
        outgoing_slots=migration.outgoing_slots,
        incoming_slots=migration.incoming_slots,
        preflight_deadline_s=migration.preflight_deadline_s,
        prepare_deadline_s=migration.prepare_deadline_s,
        switchover_deadline_s=migration.switchover_deadline_s,
        grant_deadline_s=migration.grant_deadline_s,
        rollback_deadline_s=migration.rollback_deadline_s,
        release_deadline_s=migration.release_deadline_s,
        stall_s=migration.stall_s,
        receive_idle_s=migration.receive_idle_s,
        loaded_idle_s=migration.loaded_idle_s,
        watch_interval_s=settings.watch.interval_s,
        history=settings.events.history_events,
        queue=settings.events.queue_events,
        peers={name.lower(): entry.url for name, entry in settings.peers.items()},
        migrd_version=migrd.__version__,
        tracking_policy=settings.devices.tracking_policy,
        forbidden_tracking_policies=frozenset(settings.devices.forbidden_tracking_policies),
        dma_sample_interval_s=settings.devices.sample_interval_s,
        dma_sample_budget_s=settings.devices.sample_budget_ms / 1000,
        sampling=sampling_options(settings),
    )


def sampling_options(settings: Settings) -> SamplingOptions:
    """What is measured outside of migrations."""
    sampling = settings.sampling
    is_off = sampling.qemu_mode is QemuSampling.OFF
    return SamplingOptions(
        mode=None if is_off else RateMode(sampling.qemu_mode.value),
        interval_s=sampling.interval_s,
        windows_s=tuple(window_ms / 1000 for window_ms in sampling.windows_ms),
        pages=sampling.sampled_pages,
        budget_share=sampling.budget_percent / 100,
    )


def etcd_options(settings: Settings) -> EtcdOptions:
    """How etcd is reached, and what its list of hosts says of this one."""
    arbiter, peer, tcp = settings.arbiter, settings.peer, settings.api.tcp
    return EtcdOptions(
        host=settings.host.name.lower(),
        endpoints=arbiter.endpoints,
        prefix=arbiter.prefix,
        files=AccessFiles(
            arbiter.ca, arbiter.cert, arbiter.key, arbiter.user, arbiter.password_file
        ),
        within_s=arbiter.request_timeout_ms / 1000,
        lease_ttl_s=arbiter.lease_ttl_s,
        about={
            "migrd_version": migrd.__version__,
            "peer": peer.listen_host and f"{peer.listen_host}:{peer.listen_port}",
            "api": tcp and f"{tcp.host}:{tcp.port}",
        },
    )
