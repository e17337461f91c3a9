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
import glob
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from migrd.core.facts import Feature, VmSpec
from migrd.engine.ports import Vmm
from migrd.engine.threads import in_thread
from migrd.errors import (
    ConfigError,
    Conflict,
    Invalid,
    MigrdError,
    Violation,
    VmmError,
)
from migrd.qemu.adoption import VM_NAME, AdoptDirectory, Adopted
from migrd.qemu.instances import SUN_PATH_BYTES, Found, Instance, LaunchRecord, examine
from migrd.qemu.machine import Machine
from migrd.qemu.probe import Probed, Prober
from migrd.qemu.process import Attachment, Life, WatchedProcess
from migrd.qemu.profile import Resolved
from migrd.qemu.profile_files import Profiles
from migrd.qemu.qmp import DEFAULT_DEADLINE_S, CallObserver
from migrd.qemu.spawn import Child, spawn
from migrd.qemu.starting import Known, command_line, end_failed, to_the_end, verify_started

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

    def check(self, spec: VmSpec) -> str:
        """Blocking (looks at files; shared storage may hang): call it by `in_thread`."""
        return self._resolve(spec).digest()

    async def probe(self, spec: VmSpec) -> tuple[str, frozenset[Feature]]:
        profile = (await in_thread(self._resolve, spec)).profile
        probed = await self._prober.ask(profile.binary, profile.accelerator, profile.environment)
        return probed.version, probed.features

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

    def _resolve(self, spec: VmSpec, instance: str = "i" * INSTANCE_CHARS) -> Resolved:
        """Raises Invalid, NotFound."""
        at = Instance(self._runtime_dir, spec.name, instance)
        if not VM_NAME.fullmatch(spec.name):
            text = f"{spec.name!r} is no name for a VM: letters, digits and . _ - inside"
            raise Invalid(text, [Violation("name", "bad_name", text)])
        if not VM_NAME.fullmatch(instance):
            text = f"{instance!r} is no name for an instance: letters, digits and . _ - inside"
            raise Invalid(text, [Violation("instance", "bad_name", text)])
        if at.spare_bytes < 0:
            text = (
                f"{spec.name!r} is {-at.spare_bytes} characters too long for the path of a socket "
                f"below {self._runtime_dir}; shorten it, or host.runtime_dir"
            )
            raise Invalid(text, [Violation("name", "name_too_long", text)])
        return self.profiles.resolve(spec)

    # Launching

    async def launch(self, spec: VmSpec, instance: str, *, incoming: bool) -> Vmm:
        """As the port says. Also raises Invalid, NotFound (as `check`); Conflict when the instance
        exists; VmmTimedOut when a QEMU that did not answer could not be seen to end either."""
        key = (spec.name, instance)
        if key in self._launching or key in self._known:
            raise Conflict(f"{spec.name} has an instance {instance}", code="instance_exists")
        self._launching.add(key)
        began_s = time.monotonic()
        at = Instance(self._runtime_dir, spec.name, instance)
        started: list[Child] = []
        known: Known | None = None
        try:
            record, probed = await in_thread(self._spawn, spec, at, incoming, started)
            known = self._hold(
                at, spec, started.pop(), has_serial=record.has_serial, expected=probed
            )
            limit_s = self._start_deadline_s
            await verify_started(known, at, incoming=incoming, within_s=limit_s)
            self._known[key] = known  # before it is no longer `launching`: `find` looks in a thread
        except BaseException as cause:
            if started:  # cancelled meanwhile, or its identity could not be noted
                known = self._hold(at, spec, started.pop())
            if known is None:
                raise
            answer = await to_the_end(end_failed(known, at, cause))
            if isinstance(cause, MigrdError | OSError):
                raise answer from cause
            raise
        finally:
            self._launching.discard(key)
        how = "waiting for a guest" if incoming else "running"
        took_ms = (time.monotonic() - began_s) * 1000
        log.info("%s: QEMU is pid %s, %s, in %.0f ms", spec.name, known.process.pid, how, took_ms)
        return known.machine

    def _spawn(
        self, spec: VmSpec, at: Instance, incoming: bool, started: list[Child]
    ) -> tuple[LaunchRecord, Probed | None]:
        resolved = self._resolve(spec, at.name)
        record = LaunchRecord(
            spec=spec,
            instance=at.name,
            incoming=incoming,
            argv=tuple(command_line(resolved, at, incoming=incoming)),
            digest=resolved.digest(),
            has_serial=resolved.profile.serial,
            requested_wall_s=time.time(),
        )
        probed = self._prober.recall(resolved.profile.binary)
        spawn(at, record, resolved.profile.environment, started)
        return record, probed

    def _hold(
        self,
        at: Instance,
        spec: VmSpec,
        child: Child,
        *,
        has_serial: bool = False,
        expected: Probed | None = None,
    ) -> Known:
        process = WatchedProcess(child.identity, Life.ALIVE, child.pidfd, is_ours=True)
        attachment = Attachment(at.vm, at.name, at.qmp_path, at.oob_path, process)
        return Known(self._machine(attachment, expected), process, spec, at, has_serial)

    def _machine(self, attachment: Attachment, expected: Probed | None = None) -> Machine:
        return Machine(
            attachment,
            call_deadline_s=self._call_deadline_s,
            observe=self._observe,
            expected=expected,
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
        instances = []
        # Not Path.glob: a directory that is removed while it looks is an error to it.
        for found in sorted(glob.glob(f"{glob.escape(str(self._runtime_dir))}/vms/*/*")):
            directory = Path(found)
            vm, name = directory.parent.name, directory.name
            if (vm, name) in self._known or (vm, name) in self._launching:
                continue
            if not (VM_NAME.fullmatch(vm) and VM_NAME.fullmatch(name) and directory.is_dir()):
                log.warning("%s: not made by migrd; left alone", directory)
                continue
            instances.append(Instance(self._runtime_dir, vm, name))
        return instances

    def _attach_found(self, found: Found) -> Known:
        at, record = found.instance, found.record
        if record is None:
            cure = "" if found.life is not Life.UNKNOWN else "; remove it if no QEMU uses it"
            text = "%s: no launch.json that can be read, its process is %s%s"
            log.warning(text, at.directory, found.life.value, cure)
        process = WatchedProcess(found.identity, found.life, found.pidfd, is_ours=True)
        attachment = Attachment(at.vm, at.name, at.qmp_path, at.oob_path, process)
        spec = record.spec if record is not None else VmSpec(at.vm, None)
        known = Known(
            self._machine(attachment), process, spec, at, record is not None and record.has_serial
        )
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

    async def close(self) -> None:
        """Disconnect from all; the QEMUs go on, and the next daemon finds them."""
        for known in list(self._known.values()):
            await known.close()
        self._known.clear()


async def _connect(machine: Machine) -> None:
    with contextlib.suppress(MigrdError):
        await machine.wait_connected(within_s=FIRST_CONNECT_S)
