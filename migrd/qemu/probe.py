"""What a QEMU binary offers, asked of a process that has no machine and lives for a moment.

    qemu -machine none -qmp stdio  ◄── qmp_capabilities, query-qmp-schema, properties, quit
                                   ──► greeting (version), schema (features), the end

What it offers for passthrough is read from the properties of `vfio-pci` and of the object type
`iommufd`; a QEMU without the type refuses the question.

Traps
- qom-list-types loads every module there is, and one of another build ends the process.
- QEMU ends without waiting for what a full pipe has not yet taken: its answers go to a file. (All
  questions are asked at once, `quit` included, so that it ends by itself when this daemon dies.)

A binary is asked once, and again when the file has changed. A wrapper script hides a change behind
it until the daemon restarts.
"""

import asyncio
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

import orjson

from migrd.core.facts import Feature
from migrd.core.vfio_launch import QemuVfioFeature
from migrd.engine.threads import in_thread
from migrd.errors import VmmDied, VmmTimedOut
from migrd.qemu.passthrough import DRIVER, IOMMUFD, read_properties, vfio_features
from migrd.qemu.samples import read_version
from migrd.qemu.schema import QmpSchema, read_schema
from migrd.qemu.wire import json_object

PROBE_DEADLINE_S: Final = 10.0
_DEVICE, _IOMMUFD = f"properties of {DRIVER}", f"properties of {IOMMUFD}"
_ASKED: Final[Mapping[str, Mapping[str, object]]] = MappingProxyType(
    {
        "qmp_capabilities": {"execute": "qmp_capabilities"},
        "schema": {"execute": "query-qmp-schema"},
        _DEVICE: {"execute": "qom-list-properties", "arguments": {"typename": DRIVER}},
        _IOMMUFD: {"execute": "qom-list-properties", "arguments": {"typename": IOMMUFD}},
        "quit": {"execute": "quit"},
    }
)
"""By the id that the answer carries."""
_QUESTIONS: Final = b"".join(
    orjson.dumps({**question, "id": id_}) + b"\n" for id_, question in _ASKED.items()
)
MOST_BYTES: Final = 64 << 20
"""Of output; a schema has 0.3 MiB."""

Signature = tuple[int, int, int, int]


@dataclass(frozen=True)
class Probed:
    """One binary's answer."""

    version: str
    """For people."""
    schema: QmpSchema
    greeted: object
    """`version` of its greeting: version and package."""
    vfio_features: frozenset[QemuVfioFeature] = frozenset()

    @property
    def features(self) -> frozenset[Feature]:
        return self.schema.features


@dataclass
class Prober:
    """Asks binaries, and remembers. One task asks one binary at a time."""

    _known: dict[str, tuple[Signature, Probed]] = field(default_factory=dict)
    _asking: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def ask(self, binary: str, accelerator: str, environment: Mapping[str, str]) -> Probed:
        """Raises VmmDied when it does not run or says nothing useful, VmmTimedOut."""
        async with self._asking:
            return await in_thread(self._ask, binary, accelerator, environment)

    def recall(self, binary: str) -> Probed | None:
        """What this very file said, if it was asked; starts nothing. Blocking."""
        try:
            return self._recall(binary, _signature(binary))
        except OSError:
            return None

    def _recall(self, binary: str, signature: Signature) -> Probed | None:
        known = self._known.get(binary)
        return known[1] if known is not None and known[0] == signature else None

    def _ask(self, binary: str, accelerator: str, environment: Mapping[str, str]) -> Probed:
        try:
            signature = _signature(binary)
        except OSError as failure:
            raise _useless(binary, failure.strerror or str(failure)) from failure
        known = self._recall(binary, signature)
        if known is not None:
            return known
        probed = _run(binary, accelerator, environment)
        self._known[binary] = (signature, probed)
        return probed


def _signature(binary: str) -> Signature:
    about = os.stat(binary)
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def _run(binary: str, accelerator: str, environment: Mapping[str, str]) -> Probed:
    fixed = ["-nodefaults", "-no-user-config", "-display", "none", "-machine", "none"]
    argv = [binary, *fixed, "-accel", accelerator.partition(",")[0], "-qmp", "stdio"]
    with tempfile.TemporaryFile() as answers:
        try:
            done = subprocess.run(
                argv,
                input=_QUESTIONS,
                stdout=answers,
                stderr=subprocess.PIPE,
                cwd="/",
                env={
                    "LC_ALL": "C.UTF-8",
                    "PATH": os.environ.get("PATH", os.defpath),
                    **environment,
                },
                start_new_session=True,
                timeout=PROBE_DEADLINE_S,
            )
        except OSError as failure:
            raise _useless(binary, failure.strerror or str(failure)) from failure
        except subprocess.TimeoutExpired as failure:
            text = f"{binary} did not answer within {PROBE_DEADLINE_S} s when asked what it offers"
            raise VmmTimedOut(text) from failure
        answers.seek(0)
        output = answers.read(MOST_BYTES)
    greeting, returned = _answers(output)
    if not greeting or "schema" not in returned:
        words = done.stderr[-1024:].decode(errors="replace").strip()
        raise _useless(binary, words or f"it ended with code {done.returncode}")
    offered = vfio_features(*(read_properties(returned.get(id_)) for id_ in (_DEVICE, _IOMMUFD)))
    schema = read_schema(returned["schema"])
    return Probed(read_version(greeting), schema, greeting.get("version"), offered)


def _answers(output: bytes) -> tuple[dict[str, Any], dict[str, object]]:
    """The greeting, and what was returned to each question that was not refused."""
    greeting: dict[str, Any] = {}
    returned: dict[str, object] = {}
    for line in output.splitlines():
        try:
            message = json_object(orjson.loads(line))
        except orjson.JSONDecodeError:
            continue
        greeting = json_object(message.get("QMP")) or greeting
        if message.get("id") in _ASKED and message.get("return") is not None:
            returned[message["id"]] = message["return"]
    return greeting, returned


def _useless(binary: str, why: str) -> VmmDied:
    return VmmDied(
        f"{binary} does not run as a QEMU: {why}; install QEMU, or mend `binary` of the profile",
        code="qemu_unusable",
    )
