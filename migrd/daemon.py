"""The daemon: the only place that knows every part, and builds them in order.

    settings > log > directories > journal > launchers, listener for processes that hand over
             > peers (TLS) > arbiter > passthrough (sysfs, VFIO) > engine (replays, goes on)
             > listener for peers > API > READY
             ...... signal > STOPPING, in reverse

Whatever is built is an async context on one stack, so a failure half way undoes what was done, and
a stop touches no guest: QEMUs are detached, migrations go on from the journal.
"""

import asyncio
import contextlib
import grp
import signal
import ssl
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final

import structlog

import migrd
from migrd import failpoints
from migrd.api.app import build_app
from migrd.api.auth import Gate, load_tokens
from migrd.api.models_migration import Defaults
from migrd.api.server import ApiServer, serving
from migrd.api.table import Limits, Scrape
from migrd.arbiter.arbiter import connect_arbiter
from migrd.config import ArbiterKind, Settings
from migrd.direct.handoff_listener import HandoffListener
from migrd.direct.launcher import DirectLauncher
from migrd.direct.offer import OfferedDeviceLog, OfferedHwpt, OfferedRange
from migrd.direct.parts import KernelParts
from migrd.direct.profile_files import load_direct_profiles
from migrd.direct.vmm import DirectOptions
from migrd.engine.arbiter_port import Arbiter, ArbiterState, NoArbiter
from migrd.engine.dirty_ports import DirtySource, IovaPiece
from migrd.engine.engine import Engine
from migrd.engine.ports import Peer
from migrd.engine.stream import Stream
from migrd.engine.threads import in_thread
from migrd.engine.world import World
from migrd.engine_settings import engine_options, etcd_options
from migrd.errors import ConfigError
from migrd.journal.retention import Retention
from migrd.journal.sqlite import open_journal
from migrd.kernel.dirty_device import DeviceLogSource
from migrd.kernel.dirty_iommufd import HwptSource
from migrd.kernel.dirty_process import ProcessRange, ProcessSource
from migrd.kernel.inventory import HostInventory
from migrd.kernel.passthrough import KernelPassthrough
from migrd.kernel.vfio import VfioDevice
from migrd.launchers import EngineLauncher, Launchers
from migrd.log import configure
from migrd.metrics.exposition import Exposition
from migrd.metrics.loop_lag import LoopLagProbe
from migrd.metrics.recorder import Metrics
from migrd.peer.client import connect_peer
from migrd.peer.server import serve_peers
from migrd.peer.tls import PeerTls, TlsFiles
from migrd.qemu.launch import QemuLauncher
from migrd.qemu.profile_files import load_profiles
from migrd.systemd import Notifier, listen_fds

log = structlog.get_logger(__name__)

TLS_RELOAD_S: Final = 60.0
DAY_S: Final = 86400.0


async def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT. Raises ConfigError, JournalError when it cannot start."""
    configure(settings.log)
    failpoints.arm_from_environment()
    notifier = Notifier()  # takes systemd's variables out of the environment, before any QEMU
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with running(settings, notifier):
        notifier.ready()
        log.info("ready", host=settings.host.name, version=migrd.__version__)
        await stop.wait()
        notifier.stopping()
        log.info("stopping; guests and QEMUs are left as they are")


@contextlib.asynccontextmanager
async def running(settings: Settings, notifier: Notifier) -> AsyncIterator[None]:
    """The whole daemon, ready inside."""
    async with contextlib.AsyncExitStack() as stack:
        await in_thread(_make_directories, settings)
        metrics = Metrics(settings.peers)
        tls = await _peer_tls(settings)  # one for both directions: renewals reach both
        world = await _world(settings, metrics, tls, stack)
        engine = await stack.enter_async_context(Engine(world))
        exposition = Exposition(metrics, engine.service)
        probe = LoopLagProbe(metrics.loop_lag)
        background = await stack.enter_async_context(_background())
        background.create_task(probe.run(), name="loop-lag")
        await exposition.refresh()  # a first scrape must not find nothing
        background.create_task(exposition.run(), name="metrics")
        await _listen_for_peers(settings, engine, tls, background, stack)
        await _listen_for_clients(settings, engine, exposition, stack)
        background.create_task(notifier.feed_watchdog(probe.take_worst_s), name="watchdog")
        yield


def _make_directories(settings: Settings) -> None:
    """Blocking."""
    for directory in (
        settings.host.state_dir,
        settings.host.runtime_dir,
        settings.journal.path.parent,
    ):
        try:
            directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        except OSError as exc:
            raise ConfigError(f"{directory} cannot be made: {exc.strerror}") from exc


@contextlib.asynccontextmanager
async def _background() -> AsyncIterator[asyncio.TaskGroup]:
    """Tasks that end with the daemon; a defect in one of them ends it."""

    async def stopped() -> None:
        raise _Stopped

    try:
        async with asyncio.TaskGroup() as group:
            try:
                yield group
            finally:
                group.create_task(stopped())
    except* _Stopped:
        pass


class _Stopped(Exception):
    """Ends the background tasks."""


# The world ----------------------------------------------------------------------------------------


async def _world(
    settings: Settings,
    metrics: Metrics,
    tls: PeerTls | None,
    stack: contextlib.AsyncExitStack,
) -> World:
    journal = await stack.enter_async_context(
        open_journal(
            settings.journal.path,
            retention=Retention(
                settings.journal.keep_days * DAY_S, settings.journal.keep_migrations
            ),
            on_commit=metrics.journal_committed,
        )
    )
    launcher = await _launchers(settings, metrics, stack)
    peers: dict[str, Peer] = {}
    for name, entry in settings.peers.items():
        if tls is not None:
            peer = await stack.enter_async_context(connect_peer(name, entry.url, tls))
            peers[peer.name] = peer
    options = engine_options(settings)
    stream = Stream(history=options.history, queue=options.queue)
    passthrough = KernelPassthrough()
    stack.callback(passthrough.close)
    return World(
        options,
        journal,
        launcher,
        peers,
        stream,
        observer=metrics,
        inventory=HostInventory(rescan_every_s=settings.devices.rescan_interval_s),
        passthrough=passthrough,
        arbiter=await _arbiter(settings, metrics, stream, stack),
    )


async def _arbiter(
    settings: Settings, metrics: Metrics, stream: Stream, stack: contextlib.AsyncExitStack
) -> Arbiter:
    """etcd need not be up: until it is, readiness says so."""
    if settings.arbiter.kind is ArbiterKind.JOURNAL:
        return NoArbiter()

    def tell(state: ArbiterState) -> None:
        kind = "arbiter.reachable" if state.is_reachable else "arbiter.unreachable"
        stream.publish(kind, {"arbiter": state.kind, "problem": state.problem})

    watched = metrics.watch_arbiter()
    return await stack.enter_async_context(
        connect_arbiter(
            etcd_options(settings),
            observe=watched.requested,
            on_look=watched.looked,
            on_change=tell,
        )
    )


async def _launchers(
    settings: Settings, metrics: Metrics, stack: contextlib.AsyncExitStack
) -> Launchers:
    host = settings.host
    profiles = await in_thread(load_profiles, host.profiles_dir)
    qemu = QemuLauncher(profiles, host.runtime_dir, host.adopt_dir, observe=metrics.qmp_called)
    stack.push_async_callback(qemu.close)
    direct = await _direct_launcher(settings, stack)
    return Launchers(
        [
            EngineLauncher(profiles.by_name, qemu),
            EngineLauncher(direct.profiles.by_name, direct),
        ]
    )


async def _direct_launcher(settings: Settings, stack: contextlib.AsyncExitStack) -> DirectLauncher:
    """Listening: processes that were there before this daemon hand over anew at once."""
    direct = settings.direct
    profiles = await in_thread(load_direct_profiles, settings.host.profiles_dir)
    options = DirectOptions(direct.channels, direct.largest_guest_mib << 20)
    launcher = DirectLauncher(
        profiles, settings.host.runtime_dir, direct.socket, KERNEL_PARTS, options
    )
    gid = await in_thread(_gid, "direct.socket_group", direct.socket_group)
    listener = HandoffListener(
        direct.socket,
        on_client=launcher.take,
        mode=direct.socket_mode,
        gid=None if gid < 0 else gid,
        uids=direct.allow_uids,
    )
    await stack.enter_async_context(listener)
    stack.push_async_callback(launcher.close)  # before the listener: guests are resumed by it
    return launcher


def _hwpt_source(offered: OfferedHwpt, name: str) -> DirtySource:
    pieces = [IovaPiece(one.address, one.length_bytes, one.first_page) for one in offered.ranges]
    size = offered.page_size_bytes
    return HwptSource.handed_over(offered.iommufd_fd, offered.hwpt_id, pieces, size, name)


def _device_log_source(offered: OfferedDeviceLog, name: str) -> DirtySource:
    pieces = [IovaPiece(one.address, one.length_bytes, one.first_page) for one in offered.ranges]
    return DeviceLogSource(offered.device_fd, pieces, offered.page_size_bytes, name)


def _process_source(pagemap_fd: int, ranges: Sequence[OfferedRange], name: str) -> DirtySource:
    pieces = [ProcessRange(one.address, one.length_bytes, one.first_page) for one in ranges]
    return ProcessSource(pagemap_fd, pieces, name)


KERNEL_PARTS: Final = KernelParts(
    _process_source, _hwpt_source, _device_log_source, VfioDevice.adopt
)


async def _peer_tls(settings: Settings) -> PeerTls | None:
    peer = settings.peer
    if peer.cert is None or peer.key is None or peer.ca is None:
        return None  # then there are no peers: the configuration's own rule
    return await PeerTls.load(TlsFiles(peer.cert, peer.key, peer.ca), settings.host.name)


# Listeners ----------------------------------------------------------------------------------------


async def _listen_for_peers(
    settings: Settings,
    engine: Engine,
    tls: PeerTls | None,
    background: asyncio.TaskGroup,
    stack: contextlib.AsyncExitStack,
) -> None:
    if tls is None or settings.peer.listen_host is None:
        return
    background.create_task(_reload_tls(tls), name="peer-tls")
    roster = frozenset(name.lower() for name in settings.peers)
    await stack.enter_async_context(
        serve_peers(
            engine.reception, roster, tls, settings.peer.listen_host, settings.peer.listen_port
        )
    )


async def _reload_tls(tls: PeerTls) -> None:
    """Renewed certificates take effect by themselves."""
    while True:
        await asyncio.sleep(TLS_RELOAD_S)
        await tls.reload_if_changed()


async def _listen_for_clients(
    settings: Settings,
    engine: Engine,
    exposition: Exposition,
    stack: contextlib.AsyncExitStack,
) -> None:
    api = settings.api

    def metrics() -> Scrape:
        snapshot = exposition.serve()
        return Scrape(snapshot.body, snapshot.content_type, snapshot.etag, snapshot.gzipped)

    defaults = Defaults(settings.migration.default_policy(), settings.migration.multifd_channels)
    app = build_app(
        engine.service,
        metrics=metrics,
        defaults=defaults,
        limits=Limits(body_limit_bytes=api.body_limit_bytes),
        gate=Gate(frozenset(api.allow_uids), frozenset(api.allow_gids)),
    )
    server = await stack.enter_async_context(serving(app))
    inherited = listen_fds()
    for each in inherited:
        await server.serve_inherited(each.socket)
    if not inherited:
        gid = await in_thread(_gid, "api.socket_group", api.socket_group)
        await server.serve_unix(api.socket, mode=api.socket_mode, gid=gid)
    await _listen_on_tcp(settings, server)


async def _listen_on_tcp(settings: Settings, server: ApiServer) -> None:
    tcp = settings.api.tcp
    if tcp is None or tcp.token_file is None:
        return
    tokens = await in_thread(load_tokens, tcp.token_file)
    tls = None
    if tcp.tls_cert is not None:
        tls = await in_thread(_server_tls, tcp.tls_cert, tcp.tls_key)
    await server.serve_tcp(tcp.host, tcp.port, tokens=tokens, tls=tls)


def _server_tls(cert: Path, key: Path | None) -> ssl.SSLContext:
    """Blocking. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError(
            f"api.tcp.tls_cert {cert} or tls_key {key} cannot be used: {exc}"
        ) from exc
    return context


def _gid(key: str, group: str | None) -> int:
    """-1: the daemon's own. Blocking. Raises ConfigError."""
    if group is None:
        return -1
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(
            f"{key} {group!r} is no group of this system: create it, or name another"
        ) from None
