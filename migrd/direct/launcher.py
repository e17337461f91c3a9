"""Starting, finding and ending processes of the direct engine: fulfils `engine.ports.Launcher`.

    launch   check ► directory, intent, fork (processes.spawn) ► its hand-over has come ► DirectVmm
    take     the listener's callback: a hand-over goes to the VMM whose process it is, or waits
    find     directories of earlier daemons              ┐
             hand-overs of processes nobody knows yet    ┴► each as a DirectVmm, once
    forget   proven dead ► files removed

When is a process started? When it has handed over (or, `incoming`, said that it waits), and the
kernel says that the one that spoke is the one that was started. A script as `command` must
therefore end in `exec`ing the program.

A process that hands over by itself is adopted under the VM name it gives: its record is written as
if it had been launched, so that the next daemon can prove its death. It is never killed.

What the process finds in its environment: MIGRD_SOCKET, MIGRD_VM, MIGRD_INSTANCE and, where it is
to wait for a guest, MIGRD_INCOMING=1.
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
from migrd.direct.guest import About
from migrd.direct.handoff import HandedOver
from migrd.direct.instances import OUTPUT, Found, Instance, LaunchRecord, examine
from migrd.direct.known import (
    Known,
    adopted_record,
    end_failed,
    first_connect,
    note_adopted,
    noted,
)
from migrd.direct.messages import ClientState
from migrd.direct.parts import KernelParts
from migrd.direct.profile import Resolved
from migrd.direct.profile_files import DirectProfiles
from migrd.direct.vmm import OFFERED, DirectOptions, DirectVmm, version_text
from migrd.engine.ports import PassedDevices, Vmm
from migrd.engine.threads import in_thread
from migrd.errors import (
    Conflict,
    Invalid,
    MigrdError,
    Violation,
    VmmUnreachable,
)
from migrd.processes.ending import to_the_end
from migrd.processes.instance import NAME
from migrd.processes.process import Life, WatchedProcess, identify
from migrd.processes.spawn import Child, Inheritance, Wording, spawn

START_DEADLINE_S: Final = 30.0

log = logging.getLogger(__name__)

Key = tuple[str, str]
"""VM, instance."""


class DirectLauncher:
    """Make one per daemon; its listener calls `take`. `close` it: the processes go on."""

    def __init__(
        self,
        profiles: DirectProfiles,
        runtime_dir: Path,
        socket: Path,
        parts: KernelParts,
        options: DirectOptions,
        *,
        start_deadline_s: float = START_DEADLINE_S,
    ) -> None:
        """`socket`: where processes hand over."""
        self.profiles = profiles
        self._runtime_dir = runtime_dir
        self._socket = socket
        self._parts = parts
        self._options = options
        self._start_deadline_s = start_deadline_s
        self._known: dict[Key, Known] = {}
        self._launching: set[Key] = set()
        self._strangers: list[HandedOver] = []
        """Hand-overs whose process nobody knows yet."""
        self._finding = asyncio.Lock()

    # Hand-overs

    def take(self, client: HandedOver) -> None:
        """A process has handed over, anew or for the first time. Never blocks."""
        known = self._holder_of(client)
        if known is not None:
            known.vmm.attach(client)
            return
        self._strangers = [one for one in self._strangers if one.is_connected]
        self._strangers.append(client)

    def _holder_of(self, client: HandedOver) -> Known | None:
        if client.instance:
            known = self._known.get((client.vm, client.instance))
            if known is not None and known.process.pid not in (None, client.pid):
                log.warning(
                    "pid %s hands over as instance %s of %s, which is pid %s: left alone",
                    *(client.pid, client.instance, client.vm, known.process.pid),
                )
                return None
            return known
        for known in self._known.values():
            is_it = known.vmm.vm == client.vm and known.process.pid == client.pid
            if is_it and known.is_adopted and not known.process.is_dead:
                return known
        return None

    # Before

    def check(self, spec: VmSpec, devices: VfioLaunch | None = None) -> str:
        """Blocking (looks at files): call it by `in_thread`."""
        return self._resolve(spec).digest()

    def memory_bytes(self, spec: VmSpec) -> int:
        return self._resolve(spec).memory_bytes

    async def probe(self, spec: VmSpec) -> tuple[str, frozenset[Feature]]:
        """Nobody is asked: the engine is this daemon. Whether its guest can be slowed is for the
        source's process to say, so a destination does not stand in the way of it."""
        resolved = await in_thread(self._resolve, spec)
        return version_text(resolved.profile.kind), OFFERED | {Feature.AUTO_CONVERGE}

    async def vfio_features(self, spec: VmSpec) -> frozenset[QemuVfioFeature]:
        await in_thread(self._resolve, spec)
        return frozenset()

    async def versions(self) -> Mapping[str, str | None]:
        profiles = self.profiles.by_name.items()
        return {name: version_text(profile.kind) for name, profile in profiles}

    def _resolve(self, spec: VmSpec) -> Resolved:
        """Raises Invalid, NotFound."""
        if not NAME.fullmatch(spec.name):
            text = f"{spec.name!r} is no name for a VM: letters, digits and . _ - inside"
            raise Invalid(text, [Violation("name", "bad_name", text)])
        resolved = self.profiles.resolve(spec)
        most = self._options.largest_guest_bytes
        if resolved.memory_bytes > most:
            text = (
                f"profile {spec.profile} gives it {resolved.memory_bytes >> 20} MiB, and "
                f"direct.largest_guest_mib is {most >> 20}"
            )
            raise Invalid(text, [Violation("parameters", "guest_too_large", text)])
        return resolved

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
        exists; VmmTimedOut: it was not seen to end either."""
        key = (spec.name, instance)
        if key in self._launching or key in self._known:
            raise Conflict(f"{spec.name} has an instance {instance}", code="instance_exists")
        self._launching.add(key)
        began_s = time.monotonic()
        at = Instance(self._runtime_dir, spec.name, instance)
        started: list[Child] = []
        known: Known | None = None
        try:
            record = await in_thread(self._spawn, spec, at, incoming, started)
            known = self._hold(at, record, _watched(started.pop()))
            known.vmm.note_launched_here()
            await self._verify(known, incoming=incoming)
        except BaseException as cause:
            if started:  # cancelled meanwhile, or its identity could not be noted
                known = self._hold(at, None, _watched(started.pop()))
            if known is None:
                raise
            self._known.pop(key, None)
            answer = await to_the_end(end_failed(known, cause))
            if isinstance(cause, MigrdError | OSError):
                raise answer from cause
            raise
        finally:
            self._launching.discard(key)
        took_ms = (time.monotonic() - began_s) * 1000
        how = "waiting for a guest" if incoming else "running"
        log.info("%s: pid %s, %s, in %.0f ms", spec.name, known.process.pid, how, took_ms)
        return known.vmm

    def _spawn(
        self, spec: VmSpec, at: Instance, incoming: bool, started: list[Child]
    ) -> LaunchRecord:
        resolved = self._resolve(spec)
        profile = resolved.profile
        record = LaunchRecord(
            spec=spec,
            instance=at.name,
            incoming=incoming,
            argv=resolved.argv(),
            digest=resolved.digest(),
            requested_wall_s=time.time(),
            has_output=profile.output,
            kind=profile.kind,
            memory_limit_bytes=resolved.memory_bytes,
        )
        given = {
            **profile.environment,
            "MIGRD_SOCKET": os.fspath(self._socket),
            "MIGRD_VM": spec.name,
            "MIGRD_INSTANCE": at.name,
            **({"MIGRD_INCOMING": "1"} if incoming else {}),
        }
        inheritance = Inheritance(
            given, output_name=OUTPUT if profile.output else None, run_as=resolved.run_as
        )
        cure = f"mend `command` of profile {spec.profile}, or install what it names"
        spawn(at, record, inheritance, started, Wording("the process", cure))
        return record

    async def _verify(self, known: Known, *, incoming: bool) -> None:
        """Raises VmmError."""
        guest = known.vmm.guest
        client = await guest.connected(within_s=self._start_deadline_s)
        if client.pid != known.process.pid:
            raise VmmUnreachable(
                f"pid {known.process.pid} was started, but pid {client.pid} hands over: a script "
                "as `command` must end in `exec`ing the program"
            )
        wanted = {ClientState.INCOMING} if incoming else {ClientState.RUNNING, ClientState.PAUSED}
        if client.state not in wanted:
            word = client.state.name.lower()
            raise VmmUnreachable(
                f"it is {word}" + (", and does not wait for a guest" if incoming else "")
            )

    def _hold(self, at: Instance, record: LaunchRecord | None, process: WatchedProcess) -> Known:
        """From here on its hand-overs find it; those that came a moment early too."""
        spec = record.spec if record is not None else VmSpec(at.vm, None)
        has_output = record is not None and record.has_output
        about = About(
            at.vm,
            at.name,
            None if record is None else record.kind,
            None if record is None else record.memory_limit_bytes,
        )
        vmm = DirectVmm(about, process, self._parts, self._options)
        is_adopted = record is not None and record.is_adopted
        known = Known(vmm, process, spec, at, is_adopted, has_output)
        self._known[at.vm, at.name] = known
        early, self._strangers = self._strangers, []
        for client in early:
            self.take(client)
        return known

    # Finding

    async def find(self) -> Sequence[Vmm]:
        """As the port says; waits for the hand-overs of those it finds alive."""
        async with self._finding:
            found = await in_thread(self._look)
            new = [self._attach_found(await noted(one, self._stranger)) for one in found]
            await asyncio.gather(*(first_connect(one) for one in new if not one.process.is_dead))
            new += await self._adopt_strangers()
        return [one.vmm for one in new]

    def _look(self) -> list[Found]:
        """Blocking."""
        return [examine(at) for at in Instance.all_below(self._runtime_dir, self._is_known)]

    def _is_known(self, key: Key) -> bool:
        return key in self._known or key in self._launching

    def _stranger(self, at: Instance) -> HandedOver | None:
        token = (at.vm, at.name)
        named = (one for one in self._strangers if (one.vm, one.instance) == token)
        return next((one for one in named if one.is_connected), None)

    def _attach_found(self, found: Found) -> Known:
        at, record = found.instance, found.record
        if record is None:
            text = "%s: no launch.json that can be read, its process is %s"
            log.warning(text, at.directory, found.life.value)
        is_ours = record is None or not record.is_adopted
        identity = None if record is None else record.identity
        process = WatchedProcess(identity, found.life, found.pidfd, is_ours=is_ours)
        return self._hold(at, record, process)

    async def _adopt_strangers(self) -> list[Known]:
        adopted = []
        for client in tuple(self._strangers):
            if (client.vm, client.instance) in self._launching:
                continue  # it is waited for
            with contextlib.suppress(ValueError):  # taken by its own meanwhile
                self._strangers.remove(client)
                known = await self._adopt(client) if client.is_connected else None
                adopted += [] if known is None else [known]
        return adopted

    async def _adopt(self, client: HandedOver) -> Known | None:
        identity = await in_thread(identify, client.pid)
        if identity is None or not client.is_connected:
            return None  # it has ended, or comes again
        for known in self._known.values():
            if known.vmm.vm == client.vm and not known.process.is_dead:
                log.warning("%s: pid %s is not adopted: the VM is here", client.vm, client.pid)
                return None
        name = client.instance or f"adopted-{identity.pid}-{identity.start_ticks}"
        at = Instance(self._runtime_dir, client.vm, name)
        record = adopted_record(client.vm, name, identity)
        try:
            await in_thread(note_adopted, at, record)
        except OSError as failure:
            log.warning("%s: not adopted: %s", at.directory, failure.strerror)
            return None
        with client.held():
            pidfd = os.dup(client.pidfd)
        process = WatchedProcess(identity, Life.ALIVE, pidfd, is_ours=False)
        known = self._hold(at, record, process)
        known.vmm.attach(client)
        return known

    # What is known of one

    def is_managed(self, vmm: Vmm) -> bool:
        known = self._known.get((vmm.vm, vmm.instance))
        return known is not None and not known.is_adopted

    def spec_of(self, vmm: Vmm) -> VmSpec:
        known = self._known.get((vmm.vm, vmm.instance))
        return known.spec if known is not None else VmSpec(vmm.vm, None)

    def devices_of(self, vmm: Vmm) -> VfioLaunch | None:
        return None  # the process brings them itself

    async def note_devices(self, vmm: Vmm, devices: VfioLaunch) -> None:
        """Nothing to note."""

    def serial_path(self, vmm: Vmm) -> str | None:
        known = self._known.get((vmm.vm, vmm.instance))
        return None if known is None or not known.has_output else os.fspath(known.at.output_path)

    def last_words(self, vmm: Vmm) -> str:
        known = self._known.get((vmm.vm, vmm.instance))
        return "" if known is None else known.at.last_words()

    # After

    async def forget(self, vmm: Vmm) -> None:
        """As the port says; of an adopted one only our record goes. Raises Conflict for one of ours
        that is not proven dead, OSError when its files cannot be removed (call again)."""
        key = (vmm.vm, vmm.instance)
        async with self._finding:  # else a look could find again what is being removed
            known = self._known.get(key)
            if known is None:
                return
            if not known.is_adopted and not known.process.is_dead:
                text = f"the process of {vmm.vm} (pid {vmm.pid}) is not proven dead: its files stay"
                raise Conflict(text, code="vmm_not_dead")
            await known.close()
            await in_thread(known.at.remove)
            del self._known[key]
            client = known.vmm.guest.last_seen
            if client is not None and client.is_connected:
                self._strangers.append(client)

    async def close(self) -> None:
        """End what is going on here; the processes go on, and the next daemon finds them."""
        await asyncio.gather(*(known.close() for known in self._known.values()))
        self._known.clear()


def _watched(child: Child) -> WatchedProcess:
    """Owns the child's pidfd from here on."""
    return WatchedProcess(child.identity, Life.ALIVE, child.pidfd, is_ours=True)
