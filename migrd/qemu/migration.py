"""What QEMU is told before a migration, worked out from TransferSettings; pure, no monitor.

Both sides are given the same capabilities: QEMU compares little of them, and finds a difference
only deep in the stream. Every capability of ours is named each time, also the ones to be off, so
that nothing of an earlier attempt stays in force.

    always on    events             without it there is no MIGRATION event
                 return-path        else `completed` only says that the kernel took the bytes
                 pause-before-switchover   the source stops there and waits for the engine
    as asked     multifd · auto-converge · postcopy-ram · postcopy-preempt
    off          switchover-ack and whatever else could be left over

Throttling: auto-converge is a capability, and capabilities cannot change while a migration runs. So
it is switched on at the start but held at one percent (QEMU's least), and `throttle_parameters`
raises the bound later. The increment is as large as the bound: QEMU then goes there in one step.

TLS: the source checks the destination's certificate against the name it was given, the destination
checks that the client's certificate carries the source's name as CN. Both verify against the CA of
the identity's directory. Names are checked here, as they end up in a glob and in a URI.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

from migrd.core.facts import (
    REQUIRED_FEATURES,
    Feature,
    TransferAddress,
    TransferSettings,
)
from migrd.engine.ports import PortRange
from migrd.errors import VmmRefused
from migrd.qemu.schema import QmpSchema

TLS_ID: Final = "migrd-tls"
AUTHZ_ID: Final = "migrd-authz"
LEAST_THROTTLE_PERCENT: Final = 1
MOST_THROTTLE_PERCENT: Final = 99
MOST_DOWNTIME_MS: Final = 2_000_000
"""QEMU refuses a downtime-limit above 2000 s."""

_ALWAYS: Final = ("events", "return-path", "pause-before-switchover")
_OFF: Final = ("switchover-ack", "xbzrle", "zero-copy-send", "background-snapshot", "mapped-ram")
OUR_CAPABILITIES: Final = frozenset(
    {*_ALWAYS, *_OFF, "multifd", "auto-converge", "postcopy-ram", "postcopy-preempt"}
)
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.:_-]{0,251}[A-Za-z0-9])?|::[A-Za-z0-9:.]*")


def needed_features(settings: TransferSettings) -> frozenset[Feature]:
    """What a QEMU must offer for these settings."""
    asked = {
        Feature.MULTIFD: settings.multifd_channels > 0,
        Feature.AUTO_CONVERGE: settings.auto_converge,
        Feature.POSTCOPY: settings.postcopy,
        Feature.POSTCOPY_PREEMPT: settings.postcopy_preempt,
        Feature.TLS: settings.tls,
    }
    return REQUIRED_FEATURES | {feature for feature, is_asked in asked.items() if is_asked}


def refuse_missing(schema: QmpSchema, settings: TransferSettings) -> None:
    """Raises VmmRefused (`feature_missing`) naming each feature that this QEMU lacks."""
    missing = schema.missing(needed_features(settings))
    if missing:
        names = ", ".join(missing)
        raise VmmRefused(f"this QEMU does not offer: {names}", code="feature_missing")


def capabilities(schema: QmpSchema, settings: TransferSettings) -> dict[str, bool]:
    """Every capability of ours that this QEMU knows, on or off."""
    wanted: dict[str, bool] = dict.fromkeys(_ALWAYS, True) | dict.fromkeys(_OFF, False)
    wanted["multifd"] = settings.multifd_channels > 0
    wanted["auto-converge"] = settings.auto_converge
    wanted["postcopy-ram"] = settings.postcopy
    wanted["postcopy-preempt"] = settings.postcopy and settings.postcopy_preempt
    return {name: state for name, state in wanted.items() if name in schema.capabilities}


def capability_list(states: Mapping[str, bool]) -> dict[str, object]:
    """As an argument of migrate-set-capabilities."""
    rows = [{"capability": name, "state": state} for name, state in states.items()]
    return {"capabilities": rows}


def parameters(
    schema: QmpSchema, settings: TransferSettings, *, is_outgoing: bool
) -> dict[str, object]:
    """The arguments of migrate-set-parameters for one side."""
    chosen: dict[str, object] = {"tls-creds": "", "tls-hostname": "", "tls-authz": ""}
    if settings.multifd_channels > 0:
        chosen["multifd-channels"] = settings.multifd_channels
    if settings.tls:
        chosen["tls-creds"] = TLS_ID
        if is_outgoing:
            chosen["tls-hostname"] = settings.peer_name
        elif settings.peer_name and Feature.TLS_AUTHZ in schema.features:
            chosen["tls-authz"] = AUTHZ_ID
    if is_outgoing:
        chosen["max-bandwidth"] = settings.max_bandwidth_bytes_per_s
        chosen["downtime-limit"] = milliseconds(settings.downtime_limit_s)
        chosen["avail-switchover-bandwidth"] = 0
        if settings.postcopy:
            chosen["max-postcopy-bandwidth"] = 0
        if settings.auto_converge:
            chosen |= throttle_parameters(LEAST_THROTTLE_PERCENT)
    return {name: value for name, value in chosen.items() if name in schema.parameters}


def throttle_parameters(percent: int) -> dict[str, object]:
    """Auto-converge goes to `percent` in one step and no further. Out of 1…99: the nearest."""
    bound = min(max(percent, LEAST_THROTTLE_PERCENT), MOST_THROTTLE_PERCENT)
    return {
        "cpu-throttle-initial": bound,
        "cpu-throttle-increment": bound,
        "max-cpu-throttle": bound,
        "throttle-trigger-threshold": 1,  # percent: dirtier than this, and QEMU throttles
    }


def tls_objects(
    schema: QmpSchema, settings: TransferSettings, directory: str, *, is_outgoing: bool
) -> list[dict[str, Any]]:
    """Arguments of object-add, in order. Raises VmmRefused for a name that could not be matched."""
    endpoint = "client" if is_outgoing else "server"
    credentials: dict[str, Any] = {
        "qom-type": "tls-creds-x509",
        "id": TLS_ID,
        "endpoint": endpoint,
        "dir": directory,
        "verify-peer": True,
    }
    if is_outgoing or not settings.peer_name or Feature.TLS_AUTHZ not in schema.features:
        return [credentials]
    name = checked_host(settings.peer_name)
    patterns = [f"CN={name}", f"CN={name},*", f"*,CN={name}", f"*,CN={name},*"]
    rules = [{"match": match, "policy": "allow", "format": "glob"} for match in patterns]
    authz = {"qom-type": "authz-list", "id": AUTHZ_ID, "policy": "deny", "rules": rules}
    return [credentials, authz]


def tcp_uri(address: TransferAddress) -> str:
    """The URI for `migrate` and `migrate-incoming`. Port 0 lets QEMU choose."""
    host = checked_host(address.host)
    if not 0 <= address.port < 65536:
        raise VmmRefused(f"no TCP port: {address.port}", code="bad_address")
    return f"tcp:[{host}]:{address.port}" if ":" in host else f"tcp:{host}:{address.port}"


def listen_uri(host: str, ports: PortRange | None) -> str:
    """The URI for `migrate-incoming` at the first free port of a range (None: any)."""
    if ports is None:
        return tcp_uri(TransferAddress(host, 0))
    first, last = ports
    return f"{tcp_uri(TransferAddress(host, first))},to={last}"


def checked_host(host: str) -> str:
    """`host`, if it is an address or a host name. Raises VmmRefused: QEMU might read options."""
    if not _HOST.fullmatch(host):
        raise VmmRefused(f"not a host name or address: {host!r}", code="bad_address")
    return host


def milliseconds(seconds: float) -> int:
    """A downtime limit as QEMU takes it: whole milliseconds; zero only when it is meant."""
    least = 1 if seconds > 0 else 0
    return min(max(least, round(seconds * 1000)), MOST_DOWNTIME_MS)
