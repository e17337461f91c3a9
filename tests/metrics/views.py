"""Views as the engine's Service gives them, with what the metrics look at."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from migrd.core.convergence import Estimate
from migrd.core.facts import REQUIRED_FEATURES, QemuStatus, RunState, VmFacts, VmSpec
from migrd.core.migration import Mode
from migrd.engine.service import (
    Check,
    Condition,
    MigrationView,
    Progress,
    Role,
    VmView,
    Whereabouts,
)


def vm_facts(vm: str = "web", **changes: object) -> VmFacts:
    given: dict[str, object] = {
        "vm": vm,
        "run_state": RunState.RUNNING,
        "qemu_status": QemuStatus.NONE,
        "qemu_version": "10.0.2",
        "machine_type": "q35",
        "memory_bytes": 1 << 30,
        "features": REQUIRED_FEATURES,
    }
    return VmFacts(**{**given, **changes})  # type: ignore[arg-type]  # a test's shorthand


def vm_view(
    name: str = "web", facts: VmFacts | None = None, profile: str | None = "small"
) -> VmView:
    return VmView(
        name=name,
        resource_version=1,
        spec=VmSpec(name, profile),
        managed=True,
        state="running",
        facts=facts,
        facts_age_s=0.1,
        epoch=1,
    )


def migration_view(
    vm: str = "web",
    *,
    phase: str = "precopy",
    role: Role = Role.SOURCE,
    is_terminal: bool = False,
    remaining_bytes: int | None = 4096,
    dirty_bytes_per_s: float | None = 8192.0,
    predicted_blackout_s: float | None = 0.25,
    conditions: Sequence[str] = (),
) -> MigrationView:
    return MigrationView(
        id=f"id-{vm}",
        role=role,
        vm=vm,
        source="a",
        destination="b",
        phase=phase,
        generation=1,
        resource_version=1,
        is_terminal=is_terminal,
        guest_runs_on=Whereabouts.SOURCE,
        epoch=1,
        created_wall_s=0.0,
        timeline=(),
        mode=Mode.PRECOPY,
        policy=None,
        progress=Progress(remaining_bytes=remaining_bytes, dirty_bytes_per_s=dirty_bytes_per_s),
        estimate=Estimate(predicted_blackout_s, None, None, None, None),
        conditions=tuple(
            Condition(type_, "True", type_, "as planted", 0.0) for type_ in conditions
        ),
    )


@dataclass
class Host:
    """The part of Service that metrics read; `version` grows with each change, as there."""

    version: int = 1
    known: list[VmView] = field(default_factory=list)
    moving: list[MigrationView] = field(default_factory=list)
    checks: list[Check] = field(
        default_factory=lambda: [Check("recovered", True, ""), Check("journal", True, "")]
    )

    def vms(self) -> tuple[int, Sequence[VmView]]:
        return self.version, tuple(self.known)

    def migrations(self) -> tuple[int, Sequence[MigrationView]]:
        return self.version, tuple(self.moving)

    def readiness(self) -> Sequence[Check]:
        return tuple(self.checks)
