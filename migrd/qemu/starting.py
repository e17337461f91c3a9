"""From a command line to a QEMU that is known to have started, or to its end.

When is a QEMU started? Not when its socket is there, and not when it greets: both come before the
devices are made, and a device can still fail. Started means: it lives, the process that listens is
the one we started, both monitors are connected, and `query-status`, which waits for the main loop,
was answered; with `incoming` the answer has to be `inmigrate`, so that nothing can run by itself.

The waits are for events. Only the sockets are polled for, for the few milliseconds until QEMU makes
them; that is over before it has made its devices, so the polling costs no time.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from migrd.core.facts import RunState, VmSpec
from migrd.engine.threads import in_thread
from migrd.errors import Invalid, Violation, VmmDied, VmmError, VmmTimedOut, VmmUnreachable
from migrd.processes import memlock
from migrd.processes.instance import NAME, lock_says
from migrd.processes.process import Life, WatchedProcess, kill_once
from migrd.processes.spawn import Child
from migrd.qemu.attachment import listener_pid
from migrd.qemu.inheriting import Inherited
from migrd.qemu.instances import Instance, identity_by_socket
from migrd.qemu.machine import Machine
from migrd.qemu.profile import Resolved
from migrd.qemu.wire import AnswerLost, NotSent, json_object

END_DEADLINE_S: Final = 10.0
EXIT_FOLLOWS_S: Final = 0.25
"""The sockets of a QEMU that gives up close a little before it can be seen dead."""
_REST_LOOKS: Final = 100
_REST_PAUSE_S: Final = 0.01
_FIRST_POLL_S: Final = 0.0005
_LAST_POLL_S: Final = 0.002

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """One start of a QEMU, as the thread that does it needs to know it."""

    spec: VmSpec
    at: Instance
    incoming: bool
    inherited: Inherited


@dataclass
class Known:
    """A QEMU that the launcher holds."""

    machine: Machine
    process: WatchedProcess
    spec: VmSpec
    at: Instance | None
    """None: adopted."""
    has_serial: bool = False

    async def close(self) -> None:
        """Disconnect and stop watching; the process goes on."""
        await self.machine.close()
        self.process.close()


def refuse_bad_names(at: Instance) -> None:
    """Raises Invalid for names that are none, or too long for a socket."""
    for field, name, what in (("name", at.vm, "a VM"), ("instance", at.name, "an instance")):
        if not NAME.fullmatch(name):
            text = f"{name!r} is no name for {what}: letters, digits and . _ - inside"
            raise Invalid(text, [Violation(field, "bad_name", text)])
    if at.spare_bytes < 0:
        text = (
            f"{at.vm!r} is {-at.spare_bytes} characters too long for the path of a socket below "
            f"{at.runtime_dir}; shorten it, or host.runtime_dir"
        )
        raise Invalid(text, [Violation("name", "name_too_long", text)])


def command_line(
    resolved: Resolved, at: Instance, *, incoming: bool, devices: Sequence[str] = ()
) -> list[str]:
    """QEMU's whole command line: the profile's part, and what migrd adds to it. Passthrough devices
    come last, behind the bridges and ports that the profile may have for them."""
    argv = [*resolved.argv(), "-name", f"guest={at.vm},debug-threads=on"]
    if resolved.profile.serial:
        chardev = f"file,id=migrd-serial,path={_escaped(at.serial_path)},append=on"
        argv += ["-chardev", chardev, "-serial", "chardev:migrd-serial"]
    for path in (at.qmp_path, at.oob_path):  # in this order: see _listener
        argv += ["-qmp", f"unix:{_escaped(path)},server=on,wait=off"]
    argv += devices
    return [*argv, "-S", "-incoming", "defer"] if incoming else argv


def _escaped(path: Path) -> str:
    return os.fspath(path).replace(",", ",,")


def watched(child: Child) -> WatchedProcess:
    """Owns the child's pidfd from here on."""
    return WatchedProcess(child.identity, Life.ALIVE, child.pidfd, is_ours=True)


async def verify_started(known: Known, at: Instance, *, incoming: bool, within_s: float) -> None:
    """Connect its machine, and return once it is started. Raises VmmError, at once when it dies."""
    verifying = asyncio.create_task(_verify(known, at, incoming, time.monotonic() + within_s))
    dying = asyncio.create_task(known.process.wait_dead(within_s=within_s))
    try:
        await asyncio.wait({verifying, dying}, return_when=asyncio.FIRST_COMPLETED)
        if known.process.is_dead:
            raise VmmDied("it exited")
        await verifying
    finally:
        verifying.cancel()
        dying.cancel()
        await asyncio.wait({verifying, dying})


async def _verify(known: Known, at: Instance, incoming: bool, deadline_s: float) -> None:
    machine, process = known.machine, known.process
    pid = await _listener(at, deadline_s)
    if pid != process.pid:
        raise VmmUnreachable(
            f"pid {process.pid} was started, but pid {pid} listens on its monitor: a script as "
            "`binary` must end in `exec`ing QEMU"
        )
    machine.start()
    await machine.wait_connected(within_s=_left_s(deadline_s))
    if machine.oob is not None:
        await machine.oob.wait_connected(within_s=_left_s(deadline_s))
    answer = await machine.monitor.execute("query-status", deadline_s=_left_s(deadline_s))
    run_state = RunState.of(json_object(answer).get("status"))
    if incoming and run_state is not RunState.INMIGRATE:
        raise VmmUnreachable(f"it does not wait for a guest: its run state is {run_state.value}")
    machine.is_new = True


async def _listener(at: Instance, deadline_s: float) -> int:
    """Pid of who listens on the second of the sockets: then the first is listened on too."""
    path, pause_s = at.oob_path, _FIRST_POLL_S
    while True:
        try:
            return listener_pid(path) or 0
        except VmmUnreachable as failure:
            if not _left_s(deadline_s):
                raise VmmTimedOut("it made no monitor in time") from failure
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 1.3, _LAST_POLL_S)


def _left_s(deadline_s: float) -> float:
    return max(0.0, deadline_s - time.monotonic())


async def end_failed(known: Known, at: Instance, cause: BaseException) -> VmmError:
    """End a QEMU whose start did not work (no guest has ever run in it that anybody knows of), and
    return what to tell. Its files are removed once it is proven dead, and only then."""
    process = known.process
    await known.machine.close()
    grace_s = EXIT_FOLLOWS_S if isinstance(cause, NotSent | AnswerLost) else 0.0
    if not await process.wait_dead(within_s=grace_s):
        with contextlib.suppress(VmmError):
            process.kill()
    match cause:
        case VmmError():
            why = cause.message
        case OSError():
            why = f"{cause.filename or at.directory}: {cause.strerror}"
        case _:
            why = "the start was given up"
    is_over = await process.wait_dead(within_s=END_DEADLINE_S)
    if not is_over or not await in_thread(_kill_rest, at):
        process.close()
        text = f"QEMU of {at.vm} did not start ({why}), and it is not proven that nothing is left"
        log.error("%s: pid %s, %s", text, process.pid, at.directory)
        return VmmTimedOut(text)
    words = at.last_words()
    if memlock.NO_MEMORY in words and known.machine.devices.launch.devices:
        words += f"; {memlock.CURE}"
    with contextlib.suppress(OSError):
        await in_thread(at.remove)
    text = f"QEMU of {at.vm} did not start ({process.ending}): {words or why}"
    return VmmDied(text, code="vmm_start_failed")


def _kill_rest(at: Instance) -> bool:
    """Whether nothing of this launch lives, after killing a QEMU behind a script that did not
    `exec` it: the lock shows that there is one, the socket which. Blocking, for a second."""
    for _ in range(_REST_LOOKS):
        if lock_says(at) is Life.DEAD:
            return True
        identity = identity_by_socket(at)
        if identity is not None:
            kill_once(identity)
        time.sleep(_REST_PAUSE_S)
    return False
