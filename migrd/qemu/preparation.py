"""Setting one QEMU up for a migration, and taking it all back.

Nothing is remembered here: what is ours has fixed names, and "taken back" means QEMU's own
defaults. So both directions can be repeated, and a daemon restarted in between can still clean up.
(A tuning that somebody else had made of the same few parameters is lost by the first migration.)

The order matters: parameters name the TLS objects, so objects come first on the way in and last on
the way out. QEMU refuses new capabilities while a migration runs, `cancelling` included.

Trap: without a `dh-params.pem` beside the certificates, QEMU's server side searches for a prime of
its own when the object is made: 0.4 to several seconds, its whole monitor blocked meanwhile.
"""

import asyncio
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Protocol

from migrd.core.facts import Feature, QemuStatus, TransferSettings
from migrd.engine.ports import PortRange, TlsIdentity
from migrd.errors import VmmRefused
from migrd.qemu import migration, samples
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
OUR_OBJECTS: Final = (migration.TLS_ID, migration.AUTHZ_ID)


OBJECT_DEADLINE_S: Final = 30.0
_BEFORE_THE_END: Final = (QemuStatus.NONE, QemuStatus.SETUP, QemuStatus.ACTIVE)
"""Of a destination. 7.2 says nothing at all while it listens, later ones say `setup`."""


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
    is_new: bool = False,
) -> None:
    """Capabilities, TLS objects and parameters for one side. May be repeated.

    `is_new`: nobody has made objects in this QEMU, so none are taken away first.

    Raises VmmRefused: `feature_missing`, `tls_identity_missing` (never a silent plain stream), or
    QEMU's own words.
    """
    migration.refuse_missing(schema, settings)
    if settings.tls and tls is None:
        text = "the stream is to be encrypted, and this host has no TLS identity for QEMU"
        raise VmmRefused(text, code="tls_identity_missing")
    states = migration.capabilities(schema, settings)
    commands: list[tuple[str, Arguments]] = [
        ("migrate-set-capabilities", migration.capability_list(states)),
    ]
    if not is_new:  # credentials may be new ones
        commands += [("object-del", {"id": id_}) for id_ in OUR_OBJECTS]
    if settings.tls and tls is not None:
        objects = migration.tls_objects(schema, settings, tls.directory, is_outgoing=is_outgoing)
        commands += [("object-add", arguments) for arguments in objects]
    chosen = migration.parameters(schema, settings, is_outgoing=is_outgoing)
    commands.append(("migrate-set-parameters", chosen))
    await _ask_in_order(ask, commands, deadline_s=OBJECT_DEADLINE_S if settings.tls else None)


async def prepare_to_listen(
    ask: Ask,
    schema: QmpSchema,
    settings: TransferSettings,
    tls: TlsIdentity | None,
    listen_host: str,
    ports: PortRange | None,
    *,
    is_new: bool = False,
) -> int:
    """`prepare` a destination and let it listen; the port. May be repeated.

    `is_new`: it was started for this, and nobody has told it anything yet. Otherwise it is asked
    first: an earlier call may have done it, and its answer was lost.

    Raises as `prepare`; VmmRefused (`no_port`) when it does not say where it listens.
    """
    port = None if is_new else await _port_of_earlier_call(ask)
    if port is not None:
        return port
    await prepare(ask, schema, settings, tls, is_outgoing=False, is_new=is_new)
    arguments: dict[str, object] = {"uri": migration.listen_uri(listen_host, ports)}
    if Feature.INCOMING_EXIT_ON_ERROR in schema.features:
        arguments["exit-on-error"] = False  # stay, and say why it failed
    _, chosen = await asyncio.gather(ask("migrate-incoming", arguments), listening_port(ask))
    return chosen


async def _port_of_earlier_call(ask: Ask) -> int | None:
    migrate = await ask("query-migrate")
    has_had_its_one = samples.read_status(migrate) not in _BEFORE_THE_END
    return None if has_had_its_one else samples.read_port(migrate)


async def listening_port(ask: Ask) -> int:
    """Raises VmmRefused (`no_port`)."""
    port = samples.read_port(await ask("query-migrate"))
    if port is None:
        raise VmmRefused("QEMU does not say where it listens", code="no_port")
    return port


async def take_back(ask: Ask, schema: QmpSchema) -> None:
    """QEMU's defaults again, and none of our objects. May be repeated."""
    states = dict.fromkeys(migration.OUR_CAPABILITIES & schema.capabilities, False)
    values = {name: value for name, value in QEMU_DEFAULTS.items() if name in schema.parameters}
    commands: list[tuple[str, Arguments]] = [
        ("migrate-set-capabilities", migration.capability_list(states)),
        ("migrate-set-parameters", values),
        *(("object-del", {"id": id_}) for id_ in OUR_OBJECTS),
    ]
    await _ask_in_order(ask, commands)


async def _ask_in_order(
    ask: Ask, commands: Sequence[tuple[str, Arguments]], *, deadline_s: float | None = None
) -> None:
    """All are sent at once: QEMU carries them out one after the other, so the slowest makes those
    behind it wait. Raises what the first that went wrong raised; those after it were carried out
    too, or not."""
    answers = await asyncio.gather(
        *(ask(command, arguments, deadline_s=deadline_s) for command, arguments in commands),
        return_exceptions=True,
    )
    for (command, _), answer in zip(commands, answers, strict=True):
        is_absent = command == "object-del" and isinstance(answer, CommandRefused)
        if isinstance(answer, BaseException) and not is_absent:
            raise answer
