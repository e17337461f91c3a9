"""What preflight is made from: both hosts, as they answered."""

from dataclasses import dataclass

from migrd.core.facts import VmFacts, VmSpec
from migrd.core.tracking import Plan


@dataclass(frozen=True)
class DestinationFacts:
    """The destination, as its migrd answered. Features are those of the QEMU it would start."""

    host: str
    qemu_version: str | None
    features: frozenset[str]
    launch_digest: str | None
    incoming_slots_free: int
    memory_available_bytes: int | None
    vm_present: bool
    last_epoch: int
    tls: bool
    refusals: tuple[tuple[str, str], ...]
    plan: Plan | None = None
    """What it would decide about the VM's passthrough devices; None: it has none, or that host
    cannot tell."""
    arbiter: str = "journal"
    """Which kind of arbiter it has; `journal`: none."""


@dataclass(frozen=True)
class SourceFacts:
    """This host's side."""

    host: str
    vm: VmFacts
    spec: VmSpec
    launch_digest: str | None
    epoch: int
    tls: bool
    plan: Plan | None = None
    """The decision that stands for the VM here; None: no passthrough devices, or none was made."""
    is_as_it_is: bool = True
    """False: `spec` and `plan` are those of a what-if, and its QEMU has other devices."""
    arbiter: str = "journal"
