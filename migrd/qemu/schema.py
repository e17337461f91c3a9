"""What one QEMU offers, read from its own `query-qmp-schema`: never from its version.

The schema is a flat list of entries. Commands and events have their names; every other type has a
made-up one ("142"), different in each build, so an enum is found by walking to it from a command:

    migrate-set-capabilities ─arg-type─► {capabilities: [ {capability: ENUM, state: bool} ]}
    query-migrate ─ret-type─► {status: ENUM, ...}          object-add ─arg-type─► {qom-type: ENUM}

A QEMU built without a library still lists what would need it (TLS without GnuTLS): the schema
tells what may be asked, and only asking tells whether it works. Entries of a kind not met before
are passed over. The answer is 0.2 MB of text; what is kept of it is a few hundred words.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from migrd.core.facts import Feature
from migrd.qemu.wire import json_object


@dataclass(frozen=True)
class QmpSchema:
    """The words one QEMU understands, as far as migrd uses them."""

    commands: frozenset[str]
    oob_commands: frozenset[str]
    events: frozenset[str]
    capabilities: frozenset[str]
    """Of migrate-set-capabilities."""
    parameters: frozenset[str]
    """Of migrate-set-parameters."""
    migrate_arguments: frozenset[str]
    incoming_arguments: frozenset[str]
    statuses: frozenset[str]
    """QEMU's MigrationStatus."""
    object_types: frozenset[str]
    """What object-add can make."""
    multifd_compressions: frozenset[str]
    dirty_rate_arguments: frozenset[str] = frozenset()
    """Of calc-dirty-rate."""
    dirty_rate_modes: frozenset[str] = frozenset()
    """Of calc-dirty-rate; empty: this QEMU cannot choose."""
    dirty_rate_units: frozenset[str] = frozenset()
    """In which calc-dirty-rate takes its window; empty: seconds only."""

    @property
    def features(self) -> frozenset[Feature]:
        return frozenset(feature for feature, has in FEATURE_TESTS.items() if has(self))

    def missing(self, wanted: Iterable[Feature]) -> tuple[Feature, ...]:
        """Those of `wanted` that this QEMU lacks, by name."""
        return tuple(sorted(set(wanted) - self.features))


def _capability(name: str) -> Callable[[QmpSchema], bool]:
    return lambda schema: name in schema.capabilities


FEATURE_TESTS: Final[Mapping[Feature, Callable[[QmpSchema], bool]]] = MappingProxyType(
    {
        Feature.RETURN_PATH: _capability("return-path"),
        Feature.EVENTS: _capability("events"),
        Feature.PAUSE_BEFORE_SWITCHOVER: _capability("pause-before-switchover"),
        Feature.MULTIFD: _capability("multifd"),
        Feature.AUTO_CONVERGE: _capability("auto-converge"),
        Feature.POSTCOPY: _capability("postcopy-ram"),
        Feature.POSTCOPY_PREEMPT: _capability("postcopy-preempt"),
        Feature.SWITCHOVER_ACK: _capability("switchover-ack"),
        Feature.AVAIL_SWITCHOVER_BANDWIDTH: (
            lambda schema: "avail-switchover-bandwidth" in schema.parameters
        ),
        Feature.INCOMING_EXIT_ON_ERROR: lambda schema: "exit-on-error" in schema.incoming_arguments,
        Feature.TLS: (
            lambda schema: (
                "tls-creds" in schema.parameters and "tls-creds-x509" in schema.object_types
            )
        ),
        Feature.TLS_AUTHZ: (
            lambda schema: "tls-authz" in schema.parameters and "authz-list" in schema.object_types
        ),
        Feature.YANK: lambda schema: "yank" in schema.oob_commands,
        Feature.OOB: lambda schema: bool(schema.oob_commands),
        # Nothing in the schema tells of the mended TLB flush itself; this came in the same release.
        Feature.TCG_KEEPS_DIRTY_PAGES: _capability("mapped-ram"),
    }
)


KNOWN_BOUND: Final = 32
_KNOWN: Final[dict[QmpSchema, QmpSchema]] = {}
"""One object for all VMs of the same QEMU: 45 KiB each otherwise."""


def read_schema(answer: object) -> QmpSchema:
    """What `query-qmp-schema` returned, as a QmpSchema; what is missing there is not offered."""
    types = _Types(answer)
    commands = frozenset(types.named("command"))
    schema = QmpSchema(
        commands=commands,
        oob_commands=frozenset(c for c in commands if types.entry(c).get("allow-oob") is True),
        events=frozenset(types.named("event")),
        capabilities=types.words("migrate-set-capabilities", "arg-type", "capabilities.capability"),
        parameters=types.members("migrate-set-parameters"),
        migrate_arguments=types.members("migrate"),
        incoming_arguments=types.members("migrate-incoming"),
        statuses=types.words("query-migrate", "ret-type", "status"),
        object_types=types.words("object-add", "arg-type", "qom-type"),
        multifd_compressions=types.words(
            "migrate-set-parameters", "arg-type", "multifd-compression"
        ),
        dirty_rate_arguments=types.members("calc-dirty-rate"),
        dirty_rate_modes=types.words("calc-dirty-rate", "arg-type", "mode"),
        dirty_rate_units=types.words("calc-dirty-rate", "arg-type", "calc-time-unit"),
    )
    if len(_KNOWN) >= KNOWN_BOUND:
        _KNOWN.clear()
    return _KNOWN.setdefault(schema, schema)


class _Types:
    """The entries of a schema by name, and how to walk from one to another."""

    def __init__(self, answer: object) -> None:
        entries = answer if isinstance(answer, list) else []
        self._entries: dict[str, dict[str, Any]] = {
            str(entry["name"]): entry for entry in entries if _has_name(entry)
        }

    def entry(self, name: object) -> Mapping[str, Any]:
        return self._entries.get(str(name), {})

    def named(self, meta_type: str) -> Iterator[str]:
        return (n for n, entry in self._entries.items() if entry.get("meta-type") == meta_type)

    def members(self, command: str) -> frozenset[str]:
        """The argument names of a command."""
        members = self.entry(self.entry(command).get("arg-type")).get("members")
        return frozenset(str(member["name"]) for member in _named(members))

    def words(self, command: str, side: str, path: str) -> frozenset[str]:
        """The values of the enum that `path` (member names with dots) leads to."""
        entry = self.entry(self.entry(command).get(side))
        for step in path.split("."):
            types = [m.get("type") for m in _named(entry.get("members")) if m["name"] == step]
            entry = self.entry(types[0]) if types else {}
            if "element-type" in entry:  # an array: on to what it holds
                entry = self.entry(entry["element-type"])
        values = entry.get("values")
        return (
            frozenset(str(value) for value in values) if isinstance(values, list) else frozenset()
        )


def _has_name(entry: object) -> bool:
    return isinstance(entry, dict) and "name" in entry


def _named(members: object) -> list[dict[str, Any]]:
    rows = members if isinstance(members, list) else []
    return [json_object(row) for row in rows if _has_name(row)]
