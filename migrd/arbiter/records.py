"""The record of a VM as it is stored: JSON, one object, at `<prefix>/vms/<vm>`.

    {"version": 1, "vm": "web1", "owner": "alpha", "epoch": 3, "started": true,
     "run_guest": true, "migration_id": "m-..."}

Strict on both ways: a record decides who runs a guest, so one that is not understood whole (a newer
migrd's, or somebody's by hand) is not used at all. The revision is the store's, not the record's.
"""

import json
from typing import Annotated, Final
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from migrd.arbiter.store import Entry
from migrd.engine.arbiter_port import Ownership
from migrd.errors import ArbiterUnavailable

VERSION: Final = 1
MOST_BYTES: Final = 4096

Name = Annotated[str, Field(min_length=1, max_length=256)]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    version: Annotated[int, Field(ge=VERSION, le=VERSION)]
    vm: Name
    owner: Name
    epoch: Annotated[int, Field(ge=0, lt=2**63)]
    started: bool
    run_guest: bool
    migration_id: Name | None


def key_of(prefix: str, vm: str) -> str:
    """Where the record of a VM is; each name has a key of its own, whatever is in it."""
    return f"{prefix}/vms/{quote(vm, safe='')}"


def encoded(ownership: Ownership) -> bytes:
    """The value for `ownership`, without its revision."""
    record = _Record(
        version=VERSION,
        vm=ownership.vm,
        owner=ownership.owner,
        epoch=ownership.epoch,
        started=ownership.started,
        run_guest=ownership.run_guest,
        migration_id=ownership.migration_id,
    )
    return record.model_dump_json().encode()


def decoded(key: str, vm: str, entry: Entry) -> Ownership:
    """Raises ArbiterUnavailable (`arbiter_record_unreadable`), with what would settle it."""
    try:
        if len(entry.value) > MOST_BYTES:
            raise ValueError(f"it has {len(entry.value)} bytes, more than {MOST_BYTES}")
        _check_version(entry.value)
        record = _Record.model_validate_json(entry.value)
        if record.vm != vm:
            raise ValueError(f"it is the record of {record.vm!r}")
    except (ValueError, RecursionError) as wrong:
        raise ArbiterUnavailable(
            f"{key} at revision {entry.revision} is no record that this migrd understands: "
            f"{_words(wrong)}; nothing is concluded from it",
            code="arbiter_record_unreadable",
        ) from wrong
    return Ownership(
        vm=vm,
        owner=record.owner,
        epoch=record.epoch,
        started=record.started,
        revision=entry.revision,
        run_guest=record.run_guest,
        migration_id=record.migration_id,
    )


def _check_version(value: bytes) -> None:
    found = json.loads(value)
    version = found.get("version") if isinstance(found, dict) else None
    if type(version) is int and version > VERSION:
        raise ValueError(
            f"its version is {version}, and this migrd knows {VERSION}: upgrade migrd on this host"
        )


def _words(wrong: Exception) -> str:
    if not isinstance(wrong, ValidationError):
        return str(wrong) or type(wrong).__name__
    first = wrong.errors(include_input=False, include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]
