"""Setting one QEMU up for a migration, and taking it all back.

Nothing is remembered here: what is ours has fixed names, and "taken back" means QEMU's own
defaults. So both directions can be repeated, and a daemon restarted in between can still clean up.
(A tuning that somebody else had made of the same few parameters is lost by the first migration.)

The order matters: parameters name the TLS objects, so objects come first on the way in and last on
the way out. QEMU refuses new capabilities while a migration runs, `cancelling` included.

Trap: without a `dh-params.pem` beside the certificates, QEMU's server side searches for a prime of
its own when the object is made: 0.4 to several seconds, its whole monitor blocked meanwhile.
"""

import contextlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Protocol

from migrd.core.facts import TransferSettings
from migrd.engine.ports import TlsIdentity
from migrd.errors import VmmRefused
from migrd.qemu import migration
from migrd.qemu.schema import QmpSchema
from migrd.qemu.wire import Arguments, CommandRefused

QEMU_DEFAULTS: Final[Mapping[str, object]] = MappingProxyType(
    {
        "tls-creds": "",
        "tls-hostname": "",
        "tls-authz": "",
        "max-bandwidth": 128 * 1024 * 1024,
        "downtime-limit": 300,
        "avail-switchover-bandwidth": 0,
        "max-postcopy-bandwidth": 0,
        "multifd-channels": 2,
        "cpu-throttle-initial": 20,
        "cpu-throttle-increment": 10,
        "max-cpu-throttle": 99,
        "throttle-trigger-threshold": 50,
    }
)
"""Of the parameters migrd sets; a test compares them with a fresh QEMU."""


OBJECT_DEADLINE_S: Final = 30.0


class Ask(Protocol):
    async def __call__(
        self, command: str, arguments: Arguments | None = None, *, deadline_s: float | None = None
    ) -> Any: ...


async def prepare(
    ask: Ask,
    schema: QmpSchema,
    settings: TransferSettings,
    tls: TlsIdentity | None,
    *,
    is_outgoing: bool,
) -> None:
    """Capabilities, TLS objects and parameters for one side. May be repeated.

    Raises VmmRefused: `feature_missing`, `tls_identity_missing` (never a silent plain stream), or
    QEMU's own words.
    """
    migration.refuse_missing(schema, settings)
    if settings.tls and tls is None:
        text = "the stream is to be encrypted, and this host has no TLS identity for QEMU"
        raise VmmRefused(text, code="tls_identity_missing")
    states = migration.capabilities(schema, settings)
    await ask("migrate-set-capabilities", migration.capability_list(states))
    await _remove_objects(ask)  # credentials may have been renewed since
    if settings.tls and tls is not None:
        for arguments in migration.tls_objects(
            schema, settings, tls.directory, is_outgoing=is_outgoing
        ):
            await ask("object-add", arguments, deadline_s=OBJECT_DEADLINE_S)
    chosen = migration.parameters(schema, settings, is_outgoing=is_outgoing)
    await ask("migrate-set-parameters", chosen)


async def take_back(ask: Ask, schema: QmpSchema) -> None:
    """QEMU's defaults again, and none of our objects. May be repeated."""
    states = dict.fromkeys(migration.OUR_CAPABILITIES & schema.capabilities, False)
    await ask("migrate-set-capabilities", migration.capability_list(states))
    values = {name: value for name, value in QEMU_DEFAULTS.items() if name in schema.parameters}
    await ask("migrate-set-parameters", values)
    await _remove_objects(ask)


async def _remove_objects(ask: Ask) -> None:
    for object_id in (migration.TLS_ID, migration.AUTHZ_ID):
        with contextlib.suppress(CommandRefused):  # there is none
            await ask("object-del", {"id": object_id})
