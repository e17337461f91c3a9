"""The directory of one process of the direct engine, launched or adopted.

    <runtime_dir>/direct/<vm>/<instance>/      as migrd.processes.instance tells; besides
        output.log      what it printed, where its profile says so

A process that handed over by itself has one too, with its record alone: so the next daemon can
prove that it died meanwhile, and waits for it if not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from migrd.processes import instance as instances
from migrd.processes.instance import proven
from migrd.processes.process import Life

OUTPUT: Final = "output.log"


@dataclass(frozen=True)
class Instance(instances.Instance):
    """One process's directory; it need not exist."""

    below: ClassVar[str] = "direct"

    @property
    def output_path(self) -> Path:
        return self.directory / OUTPUT


@dataclass(frozen=True, kw_only=True)
class LaunchRecord(instances.LaunchRecord):
    """What launch.json says."""

    is_adopted: bool = False
    """It was launched by others, and handed over by itself."""
    has_output: bool = False
    kind: str | None = None
    """That of its profile; None: adopted."""
    memory_limit_bytes: int | None = None

    def _more(self) -> Mapping[str, object]:
        return {
            "adopted": self.is_adopted,
            "output": self.has_output,
            "kind": self.kind,
            "memory_limit_bytes": self.memory_limit_bytes,
        }

    @classmethod
    def _more_of(cls, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        limit, kind = fields["memory_limit_bytes"], fields["kind"]
        return {
            "is_adopted": bool(fields["adopted"]),
            "has_output": bool(fields["output"]),
            "kind": None if kind is None else str(kind),
            "memory_limit_bytes": None if limit is None else int(limit),
        }


@dataclass(frozen=True)
class Found:
    """An instance's directory, and what is proven of its process. Owns `pidfd`."""

    instance: Instance
    record: LaunchRecord | None
    life: Life
    pidfd: int | None = None


def examine(instance: Instance) -> Found:
    """What a directory left by an earlier daemon says. Blocking."""
    record = LaunchRecord.read(instance)
    life, pidfd = proven(instance, record.identity if record is not None else None)
    return Found(instance, record, life, pidfd)
