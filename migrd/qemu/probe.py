"""What a QEMU binary offers, asked of a process that has no machine and lives for a moment.

    qemu -machine none -qmp stdio  ◄── qmp_capabilities, query-qmp-schema, properties, quit
                                   ──► greeting (version), schema (features), the end

What it offers for passthrough is read from the properties of `vfio-pci` and of the object type
`iommufd`; a QEMU without the type refuses the question.

Traps
- qom-list-types loads every module there is, and one of another build ends the process.
- QEMU ends without waiting for what it has not yet written: `quit` is said when all is read.

A binary is asked once, and again when the file has changed. A wrapper script hides a change behind
it until the daemon restarts.
"""

import asyncio
import contextlib
import os
import subprocess
import tempfile
import threading
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
    }
)
"""By the id that the answer carries."""
_QUESTIONS: Final = b"".join(
    orjson.dumps({**question, "id": id_}) + b"\n" for id_, question in _ASKED.items()
)
_QUIT: Final = b'{"execute": "quit"}\n'
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
    try:
        heard, words, code = _converse(argv, environment)
    except OSError as failure:
        raise _useless(binary, failure.strerror or str(failure)) from failure
    except TimeoutError as failure:
        text = f"{binary} did not answer within {PROBE_DEADLINE_S} s when asked what it offers"
        raise VmmTimedOut(text) from failure
    greeting, returned = heard.greeting, heard.returned
    if not greeting or "schema" not in returned:
        raise _useless(binary, words or f"it ended with code {code}")
    offered = vfio_features(*(read_properties(returned.get(id_)) for id_ in (_DEVICE, _IOMMUFD)))
    schema = read_schema(returned["schema"])
    return Probed(read_version(greeting), schema, greeting.get("version"), offered)


def _converse(argv: list[str], environment: Mapping[str, str]) -> tuple["_Heard", str, int]:
    """Ask, read all answers, let it end: (answers, its last words, exit code). Raises TimeoutError
    (it is killed then), OSError when it cannot be started."""
    is_late = threading.Event()
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            cwd="/",
            env={"LC_ALL": "C.UTF-8", "PATH": os.environ.get("PATH", os.defpath), **environment},
            start_new_session=True,
        )

        def end_it() -> None:
            is_late.set()
            process.kill()

        alarm = threading.Timer(PROBE_DEADLINE_S, end_it)
        alarm.start()
        with process:
            try:
                heard = _hear(process)
            finally:
                alarm.cancel()
                process.kill()  # it has ended by itself, or says too much
        if is_late.is_set():
            raise TimeoutError
        words.seek(max(0, words.seek(0, os.SEEK_END) - 1024))
        return heard, words.read().decode(errors="replace").strip(), process.returncode


@dataclass
class _Heard:
    greeting: dict[str, Any] = field(default_factory=dict)
    returned: dict[str, object] = field(default_factory=dict)
    """By id, of each question that was not refused."""
    answered: set[str] = field(default_factory=set)

    def take(self, line: bytes) -> None:
        try:
            message = json_object(orjson.loads(line))
        except orjson.JSONDecodeError:
            return
        self.greeting = json_object(message.get("QMP")) or self.greeting
        id_ = message.get("id")
        if isinstance(id_, str) and id_ in _ASKED:
            self.answered.add(id_)
            if message.get("return") is not None:
                self.returned[id_] = message["return"]


def _hear(process: subprocess.Popen[bytes]) -> _Heard:
    """All answers, and the end of the process; or what it said until it said too much."""
    assert process.stdin is not None
    assert process.stdout is not None
    heard, read_bytes = _Heard(), 0
    _say(process.stdin.fileno(), _QUESTIONS)
    while read_bytes < MOST_BYTES and (line := process.stdout.readline(MOST_BYTES)):
        read_bytes += len(line)
        heard.take(line)
        if heard.answered == set(_ASKED):
            break
    _say(process.stdin.fileno(), _QUIT)
    process.stdin.close()
    if len(process.stdout.read(MOST_BYTES)) < MOST_BYTES:
        process.wait()
    return heard


def _say(fd: int, words: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # it has ended: what it said before is read
        os.write(fd, words)


def _useless(binary: str, why: str) -> VmmDied:
    return VmmDied(
        f"{binary} does not run as a QEMU: {why}; install QEMU, or mend `binary` of the profile",
        code="qemu_unusable",
    )
