"""Rules over more than one setting. Pure: no file is opened here (that is the doctor's part)."""

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from migrd.config.settings import ArbiterKind, ArbiterSettings, Settings, Tls
from migrd.core.tracking import TrackingPolicy

SUN_PATH_BYTES: Final = 107
"""Longest unix socket path (unix(7): sun_path is 108 bytes with the closing null)."""
INSTANCE_ROOM_BYTES: Final = 48
"""What is kept free below runtime_dir for `<instance directory>/<socket>` of one QEMU."""


@dataclass(frozen=True)
class Conflict:
    """One rule that does not hold."""

    key: str
    """Dotted key that would best be changed."""
    message: str
    """What is wrong with which values, and what would be right."""


def conflicts(settings: Settings) -> tuple[Conflict, ...]:
    """Every rule that these settings break."""
    return (
        *_api_conflicts(settings),
        *_peer_conflicts(settings),
        *_migration_conflicts(settings),
        *_device_conflicts(settings),
        *_arbiter_conflicts(settings.arbiter),
        *_path_conflicts(settings),
    )


def _api_conflicts(settings: Settings) -> Iterator[Conflict]:
    tcp = settings.api.tcp
    if tcp is None:
        return
    if tcp.token_file is None:
        yield Conflict(
            "api.tcp.token_file",
            "is not set, and a TCP port is never open without authentication; "
            "name a file with the token, or remove [api.tcp]",
        )
    if (tcp.tls_cert is None) != (tcp.tls_key is None):
        missing = "tls_cert" if tcp.tls_cert is None else "tls_key"
        yield Conflict(f"api.tcp.{missing}", "is not set; tls_cert and tls_key go together")
    elif tcp.tls_cert is None and not is_loopback(tcp.host):
        yield Conflict(
            "api.tcp.tls_cert",
            f"is not set, and api.tcp.host = {tcp.host!r} is not the loopback: the token would "
            "cross the network in the clear; set tls_cert and tls_key, or listen on 127.0.0.1",
        )


def _peer_conflicts(settings: Settings) -> Iterator[Conflict]:
    peer, tcp = settings.peer, settings.api.tcp
    if settings.host.name in settings.peers:
        yield Conflict(
            f"peers.{settings.host.name}",
            "is this host itself (host.name); the roster names the other hosts only",
        )
    urls: dict[str, str] = {}
    for name, entry in settings.peers.items():
        if entry.url in urls:
            yield Conflict(
                f"peers.{name}.url", f"= {entry.url!r} is also the url of peers.{urls[entry.url]}"
            )
        urls.setdefault(entry.url, name)
    if settings.peers and peer.listen_host is None:
        yield Conflict(
            "peer.listen_host",
            "is not set, but there are [peers]: the other side of a migration must be able to "
            "ask this host; name the address they reach it by",
        )
    if settings.peers or peer.listen_host is not None:
        for key in ("cert", "key", "ca"):
            if getattr(peer, key) is None:
                yield Conflict(
                    f"peer.{key}", "is not set; hosts speak to each other over mutual TLS only"
                )
    if tcp is None or peer.listen_host is None or tcp.port != peer.listen_port:
        return
    if tcp.host == peer.listen_host or _is_any(tcp.host) or _is_any(peer.listen_host):
        yield Conflict("peer.listen_port", f"= {peer.listen_port} is api.tcp.port as well")


def _migration_conflicts(settings: Settings) -> Iterator[Conflict]:
    migration = settings.migration
    has_peers = bool(settings.peers) or settings.peer.listen_host is not None
    if has_peers and migration.tls is Tls.REQUIRED and migration.tls_dir is None:
        yield Conflict(
            "migration.tls_dir",
            'is not set, but migration.tls = "required"; name the directory with QEMU\'s '
            'certificates, or set tls = "off" where the network is trusted',
        )
    if _is_any(migration.listen_host):
        yield Conflict(
            "migration.listen_host",
            f"= {migration.listen_host!r} is no address that a source could connect to; "
            "name the address the other hosts reach this one by",
        )
    ports = migration.port_range
    if ports is not None and ports[0] > ports[1]:
        yield Conflict(
            "migration.port_range", f"= {list(ports)} ends before it begins; swap the two"
        )
    elif ports is not None and ports[1] - ports[0] + 1 < migration.incoming_slots:
        yield Conflict(
            "migration.port_range",
            f"= {list(ports)} has fewer ports than incoming_slots = {migration.incoming_slots}",
        )


def _device_conflicts(settings: Settings) -> Iterator[Conflict]:
    devices = settings.devices
    forbidden = set(devices.forbidden_tracking_policies)
    allowed = [policy.value for policy in TrackingPolicy if policy not in forbidden]
    if not allowed:
        yield Conflict(
            "devices.forbidden_tracking_policies",
            "names every policy there is, so no VM could be started; leave one out",
        )
    elif devices.tracking_policy in forbidden:
        yield Conflict(
            "devices.tracking_policy",
            f'= "{devices.tracking_policy}" is among devices.forbidden_tracking_policies; '
            f"choose one of {', '.join(allowed)}, or allow it",
        )


def _arbiter_conflicts(arbiter: ArbiterSettings) -> Iterator[Conflict]:
    if arbiter.kind is ArbiterKind.ETCD and not arbiter.endpoints:
        yield Conflict(
            "arbiter.endpoints",
            'is not set, but arbiter.kind = "etcd"; name the members of the cluster, e.g. '
            '["https://192.0.2.10:2379"], or set kind = "journal"',
        )
    if arbiter.kind is not ArbiterKind.ETCD and arbiter.endpoints:
        yield Conflict(
            "arbiter.kind",
            f'= "{arbiter.kind}", but arbiter.endpoints are set; set kind = "etcd" to have etcd '
            "say who may run a VM, or remove the endpoints",
        )
    for url in {url for url in arbiter.endpoints if arbiter.endpoints.count(url) > 1}:
        yield Conflict("arbiter.endpoints", f"= {list(arbiter.endpoints)} names {url} twice")
    if (arbiter.cert is None) != (arbiter.key is None):
        missing = "cert" if arbiter.cert is None else "key"
        yield Conflict(f"arbiter.{missing}", "is not set; cert and key go together")
    if (arbiter.user is None) != (arbiter.password_file is None):
        missing = "user" if arbiter.user is None else "password_file"
        yield Conflict(f"arbiter.{missing}", "is not set; user and password_file go together")
    plain = [url for url in arbiter.endpoints if not url.startswith("https://")]
    if plain and len(plain) < len(arbiter.endpoints):
        yield Conflict(
            "arbiter.endpoints",
            f"= {list(arbiter.endpoints)} has http:// and https:// mixed; use https:// for all",
        )
    far = [url for url in plain if not is_loopback(urlsplit(url).hostname or "")]
    if far and arbiter.user is not None:
        yield Conflict(
            "arbiter.endpoints",
            f"= {far[0]!r} is not the loopback, and the password of arbiter.user would cross the "
            "network in the clear; use https://",
        )


def _path_conflicts(settings: Settings) -> Iterator[Conflict]:
    for key, socket in (
        ("api.socket", settings.api.socket),
        ("direct.socket", settings.direct.socket),
    ):
        path = str(socket)
        if len(path.encode()) > SUN_PATH_BYTES:
            yield Conflict(
                key,
                f"= {path!r} is {len(path.encode())} bytes long; "
                f"a unix socket's path has at most {SUN_PATH_BYTES}",
            )
    runtime_dir, room = str(settings.host.runtime_dir), SUN_PATH_BYTES - INSTANCE_ROOM_BYTES
    if len(runtime_dir.encode()) > room:
        yield Conflict(
            "host.runtime_dir",
            f"= {runtime_dir!r} is {len(runtime_dir.encode())} bytes long; at most {room} leave "
            "room for the sockets of each QEMU below it",
        )


def is_loopback(host: str) -> bool:
    """Whether an address or name can only be this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_any(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
