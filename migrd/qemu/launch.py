"""Starting, finding and ending the QEMUs of this host: fulfils `migrd.engine.ports.Launcher`.

    launch   check ► directory, intent, fork (spawn) ► verified (starting) ► Machine
    find     directories of earlier daemons (instances)  ┐
             sockets of others' QEMUs       (adoption)   ┴► each as a Machine, once
    forget   proven dead ► files removed

When a QEMU counts as started is told in `migrd.qemu.starting`.

Who is dead is decided by proof alone (instances, process). What is not proven dead is returned by
`find` as a Vmm that is merely unreachable, and its files stay.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from migrd.core.facts import Feature, VmSpec
from migrd.core.vfio_launch import QemuVfioFeature, VfioLaunch
from migrd.engine.ports import PassedDevices, Vmm
from migrd.engine.threads import in_thread
from migrd.errors import (
    ConfigError,
    Conflict,
    MigrdError,
    VmmError,
)
from migrd.processes.ending import to_the_end
from migrd.processes.process import Life, WatchedProcess
from migrd.processes.spawn import Child, Inheritance, Wording, spawn
from migrd.qemu.adoption import AdoptDirectory, Adopted
from migrd.qemu.attachment import Attachment
from migrd.qemu.inheriting import inheritable, refuse_lacking
from migrd.qemu.instances import (
    SUN_PATH_BYTES,
    Found,
    Instance,
    LaunchRecord,
    examine,
    rewrite_devices,
)
from migrd.qemu.machine import Machine
from migrd.qemu.passthrough import KnownDevices
from migrd.qemu.probe import Probed, Prober
from migrd.qemu.profile import LaunchProfile, Resolved
from migrd.qemu.profile_files import Profiles
from migrd.qemu.qmp import DEFAULT_DEADLINE_S, CallObserver
from migrd.qemu.starting import (
    Known,
    Start,
    command_line,
    end_failed,
    refuse_bad_names,
    verify_started,
    watched,
)

START_DEADLINE_S: Final = 30.0
"""Memory that is allocated beforehand (huge pages) takes its time."""
FIRST_CONNECT_S: Final = 1.0
"""How long `find` waits for the monitors of what it has found."""
INSTANCE_CHARS: Final = 16
"""Longest name of an instance that `check` leaves room for."""
LEAST_VM_NAME_CHARS: Final = 16

log = logging.getLogger(__name__)


class QemuLauncher:
    """Make one per daemon and runtime directory; `close` it at the end: the QEMUs go on."""

    def __init__(
        self,
        profiles: Profiles,
        runtime_dir: Path,
        adopt_dir: Path | None = None,
        *,
        start_deadline_s: float = START_DEADLINE_S,
        call_deadline_s: float = DEFAULT_DEADLINE_S,
        observe: CallObserver | None = None,
    ) -> None:
        """Raises ConfigError when no socket's name would fit below `runtime_dir`."""
        self.profiles = profiles
        self._runtime_dir = runtime_dir
        self._adopt = AdoptDirectory(adopt_dir) if adopt_dir is not None else None
        self._start_deadline_s = start_deadline_s
        self._call_deadline_s = call_deadline_s
        self._observe = observe
        self._known: dict[tuple[str, str], Known] = {}
        self._launching: set[tuple[str, str]] = set()
        self._locked_bytes: dict[tuple[str, str], int] = {}
        """How much memory the QEMUs here may have to lock for their devices."""
        self._finding = asyncio.Lock()
        self._prober = Prober()
        room = Instance(runtime_dir, "", "i" * INSTANCE_CHARS).spare_bytes
        if not runtime_dir.is_absolute() or room < LEAST_VM_NAME_CHARS:
            raise ConfigError(
                f"host.runtime_dir = {os.fspath(runtime_dir)!r} must be an absolute path, and "
                f"short: a unix socket's has at most {SUN_PATH_BYTES} bytes, which leaves "
                f"{max(room, 0)} for the name of a VM; take e.g. /run/migrd"
            )

    # Before

    def check(self, spec: VmSpec, devices: VfioLaunch | None = None) -> str:
        """Blocking (looks at files; shared storage may hang): call it by `in_thread`."""
        return self._resolve(spec, devices=devices).digest()

    def memory_bytes(self, spec: VmSpec) -> int:
        return self._resolve(spec).memory_kib * 1024

    async def probe(self, spec: VmSpec) -> tuple[str, frozenset[Feature]]:
        probed = await self._probe(spec)
        return probed.version, probed.features

    async def vfio_features(self, spec: VmSpec) -> frozenset[QemuVfioFeature]:
        return (await self._probe(spec)).vfio_features

    async def _probe(self, spec: VmSpec, devices: VfioLaunch | None = None) -> Probed:
        profile, known = await in_thread(self._recall, spec, devices)
        if known is not None:
            return known
        return await self._prober.ask(profile.binary, profile.accelerator, profile.environment)

    def _recall(
        self, spec: VmSpec, devices: VfioLaunch | None
    ) -> tuple[LaunchProfile, Probed | None]:
        profile = self._resolve(spec, devices=devices).profile
        return profile, self._prober.recall(profile.binary)

    async def versions(self) -> Mapping[str, str | None]:
        """QEMU's version for each profile, for people; None where it cannot be asked."""
        versions: dict[str, str | None] = {}
        for name, profile in self.profiles.by_name.items():
            versions[name] = None
            with contextlib.suppress(VmmError):
                asked = await self._prober.ask(
                    profile.binary, profile.accelerator, profile.environment
                )
                versions[name] = asked.version
        return versions

    def _resolve(
        self,
        spec: VmSpec,
        instance: str = "i" * INSTANCE_CHARS,
        devices: VfioLaunch | None = None,
    ) -> Resolved:
        """Raises Invalid, NotFound."""
        refuse_bad_names(Instance(self._runtime_dir, spec.name, instance))
        return self.profiles.resolve(spec, devices)

    # Launching

    async def launch(
        self,
        spec: VmSpec,
        instance: str,
        *,
        incoming: bool,
        devices: PassedDevices | None = None,
    ) -> Vmm:
        """As the port says. Also raises Invalid, NotFound (as `check`); Conflict: the instance
        exists; VmmTimedOut: it was not seen to end either; VmmRefused: it cannot take devices."""
        key = (spec.name, instance)
        if key in self._launching or key in self._known:
            raise Conflict(f"{spec.name} has an instance {instance}", code="instance_exists")
        self._launching.add(key)
        began_s = time.monotonic()
        at = Instance(self._runtime_dir, spec.name, instance)
        started: list[Child] = []
        known: Known | None = None
        try:
            with inheritable(devices) as inherited:
                start = Start(spec, at, incoming, inherited)
                await self._refuse_lacking(start)
                record, probed = await in_thread(self._spawn, start, started)
            known = self._hold(at, spec, watched(started.pop()), record, probed)
            await verify_started(known, at, incoming=incoming, within_s=self._start_deadline_s)
            self._known[key] = known  # before it is no longer `launching`: `find` looks in a thread
        except BaseException as cause:
            self._locked_bytes.pop(key, None)
            if started:  # cancelled meanwhile, or its identity could not be noted
                known = self._hold(at, spec, watched(started.pop()))
            if known is None:
                raise
            answer = await to_the_end(end_failed(known, at, cause))
            if isinstance(cause, MigrdError | OSError):
                raise answer from cause
            raise
        finally:
            self._launching.discard(key)
        _tell_started(known, incoming=incoming, took_s=time.monotonic() - began_s)
        return known.machine

    async def _refuse_lacking(self, start: Start) -> None:
        """Before anything is started: the devices of a VM, for what they need of its QEMU."""
        launch = start.inherited.launch
        if launch.devices:
            refuse_lacking(launch, await self._probe(start.spec, launch))

    def _spawn(self, start: Start, started: list[Child]) -> tuple[LaunchRecord, Probed | None]:
        inherited, at = start.inherited, start.at
        planned = inherited.launch if inherited.launch.devices else None
        resolved = self._resolve(start.spec, at.name, planned)
        own_bytes = inherited.locked_bytes(resolved.memory_kib * 1024)
        more = inherited.arguments()
        record = LaunchRecord(
            spec=start.spec,
            instance=at.name,
            incoming=start.incoming,
            argv=tuple(command_line(resolved, at, incoming=start.incoming, devices=more)),
            digest=resolved.digest(),
            has_serial=resolved.profile.serial,
            requested_wall_s=time.time(),
            devices=inherited.known_devices,
            locked_bytes=own_bytes,
        )
        probed = self._prober.recall(resolved.profile.binary)
        self._locked_bytes[at.vm, at.name] = own_bytes
        limit_bytes = sum(self._locked_bytes.copy().values()) if own_bytes else 0
        given = Inheritance(resolved.profile.environment, inherited.fds, limit_bytes)
        cure = f"install QEMU, or mend `binary` of profile {start.spec.profile}"
        spawn(at, record, given, started, Wording("QEMU", cure))
        return record, probed

    def _hold(
        self,
        at: Instance,
        spec: VmSpec,
        process: WatchedProcess,
        record: LaunchRecord | None = None,
        expected: Probed | None = None,
    ) -> Known:
        attachment = Attachment(at.vm, at.name, at.qmp_path, at.oob_path, process)
        if record is None:
            return Known(self._machine(attachment), process, spec, at)
        machine = self._machine(attachment, expected, record.devices)
        self._locked_bytes[at.vm, at.name] = record.locked_bytes
        return Known(machine, process, spec, at, record.has_serial)

    def _machine(
        self,
        attachment: Attachment,
        expected: Probed | None = None,
        devices: KnownDevices | None = None,
    ) -> Machine:
        return Machine(
            attachment,
            call_deadline_s=self._call_deadline_s,
            observe=self._observe,
            expected=expected,
            devices=devices,
        )

    # Finding

    async def find(self) -> Sequence[Vmm]:
        """As the port says; waits up to a second for the monitors of those it finds."""
        async with self._finding:
            found, adopted = await in_thread(self._look)
            new = [self._attach_found(one) for one in found]
            new += [known for one in adopted if (known := self._attach_adopted(one)) is not None]
        living = [known.machine for known in new if not known.process.is_dead]
        for machine in living:
            machine.start()
        await asyncio.gather(*map(_connect, living))
        return [known.machine for known in new]

    def _look(self) -> tuple[list[Found], list[Adopted]]:
        found = [examine(at) for at in self._directories()]
        return found, self._adopt.look() if self._adopt is not None else []

    def _directories(self) -> list[Instance]:
        """Instance directories that are not known yet. Blocking."""
        return list(Instance.all_below(self._runtime_dir, self._is_known))

    def _is_known(self, key: tuple[str, str]) -> bool:
        return key in self._known or key in self._launching

    def _attach_found(self, found: Found) -> Known:
        at, record = found.instance, found.record
        if record is None:
            cure = "" if found.life is not Life.UNKNOWN else "; remove it if no QEMU uses it"
            text = "%s: no launch.json that can be read, its process is %s%s"
            log.warning(text, at.directory, found.life.value, cure)
        process = WatchedProcess(found.identity, found.life, found.pidfd, is_ours=True)
        spec = record.spec if record is not None else VmSpec(at.vm, None)
        known = self._hold(at, spec, process, record)
        self._known[at.vm, at.name] = known
        return known

    def _attach_adopted(self, adopted: Adopted) -> Known | None:
        rival = self._rival(adopted)
        if rival is not None:
            log.warning("%s: not adopted: %s", adopted.qmp_path, rival)
            if adopted.pidfd is not None:
                os.close(adopted.pidfd)
            return None
        process = WatchedProcess(adopted.identity, adopted.life, adopted.pidfd, is_ours=False)
        attachment = Attachment(
            adopted.vm, adopted.instance, adopted.qmp_path, adopted.oob_path, process
        )
        known = Known(self._machine(attachment), process, VmSpec(adopted.vm, None), None)
        self._known[adopted.vm, adopted.instance] = known
        return known

    def _rival(self, adopted: Adopted) -> str | None:
        """Why it would be two of a name, or one QEMU twice."""
        if (adopted.vm, adopted.instance) in self._known:
            return "its QEMU is known already"
        for known in self._known.values():
            if known.process.is_dead:
                continue
            if known.machine.vm == adopted.vm and known.at is not None:
                return f"migrd itself launched a VM named {adopted.vm}, which lives"
            if adopted.identity is not None and known.process.identity == adopted.identity:
                return f"its QEMU is known already, as {known.machine.vm}"
        return None

    # What is known of one

    def is_managed(self, vmm: Vmm) -> bool:
        known = self._known.get((vmm.vm, vmm.instance))
        return known is not None and known.at is not None

    def spec_of(self, vmm: Vmm) -> VmSpec:
        known = self._known.get((vmm.vm, vmm.instance))
        return known.spec if known is not None else VmSpec(vmm.vm, None)

    def devices_of(self, vmm: Vmm) -> VfioLaunch | None:
        known = self._known.get((vmm.vm, vmm.instance))
        launch = known.machine.devices.launch if known is not None else None
        return launch if launch is not None and launch.devices else None

    async def note_devices(self, vmm: Vmm, devices: VfioLaunch) -> None:
        known = self._known.get((vmm.vm, vmm.instance))
        if known is None:
            return
        known.machine.devices.launch = devices
        if known.at is not None:
            await in_thread(rewrite_devices, known.at, known.machine.devices)

    def serial_path(self, vmm: Vmm) -> str | None:
        known = self._known.get((vmm.vm, vmm.instance))
        if known is None or known.at is None or not known.has_serial:
            return None
        return os.fspath(known.at.serial_path)

    def last_words(self, vmm: Vmm) -> str:
        known = self._known.get((vmm.vm, vmm.instance))
        return "" if known is None or known.at is None else known.at.last_words()

    # After

    async def forget(self, vmm: Vmm) -> None:
        """As the port says; of an adopted one only the connections end. Raises Conflict for one of
        ours that is not proven dead, OSError when its files cannot be removed (call again)."""
        key = (vmm.vm, vmm.instance)
        async with self._finding:  # else a look could find again what is being removed
            known = self._known.get(key)
            if known is None:
                return
            if known.at is not None and not known.process.is_dead:
                text = f"QEMU of {vmm.vm} (pid {vmm.pid}) is not proven dead: its files stay"
                raise Conflict(text, code="vmm_not_dead")
            await known.close()
            if known.at is not None:
                await in_thread(known.at.remove)
            elif self._adopt is not None:
                self._adopt.forget(vmm.vm)
            del self._known[key]
            self._locked_bytes.pop(key, None)

    async def close(self) -> None:
        """Disconnect from all; the QEMUs go on, and the next daemon finds them."""
        for known in list(self._known.values()):
            await known.close()
        self._known.clear()


def _tell_started(known: Known, *, incoming: bool, took_s: float) -> None:
    how, took_ms = "waiting for a guest" if incoming else "running", took_s * 1000
    vm, pid = known.spec.name, known.process.pid
    log.info("%s: QEMU is pid %s, %s, in %.0f ms", vm, pid, how, took_ms)


async def _connect(machine: Machine) -> None:
    with contextlib.suppress(MigrdError):
        await machine.wait_connected(within_s=FIRST_CONNECT_S)
