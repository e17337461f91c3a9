"""What only the direct engine's launcher has to do: know a process by what it says of itself."""

import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrd.core.facts import VmSpec
from migrd.daemon import KERNEL_PARTS
from migrd.demo import processes
from migrd.direct.handoff_listener import HandoffListener
from migrd.direct.launcher import DirectLauncher
from migrd.direct.profile_files import load_direct_profiles
from migrd.direct.vmm import DirectOptions
from migrd.engine.threads import in_thread
from migrd.errors import Invalid, VmmDied, VmmTimedOut

SMALL = '"--memory-mib", "16", "--working-set-mib", "1", "--filling-mib", "1"'
SPEC = VmSpec("vm", "tiny")


def write_profile(directory: Path, command: str) -> None:
    (directory / "profiles").mkdir(exist_ok=True)
    lines = ('engine = "direct"', 'description = "small"', 'kind = "demo-1"', "memory_mib = 16")
    text = "\n".join((*lines, f"command = [{command}]"))
    (directory / "profiles" / "tiny.toml").write_text(text)


@pytest.fixture
async def host(short_tmp_path: Path) -> AsyncIterator[Path]:
    guest = f'"{sys.executable}", "-m", "migrd.demo.direct_guest", {SMALL}'
    write_profile(short_tmp_path, guest)
    yield short_tmp_path
    await in_thread(processes.end, await in_thread(processes.guests_of, short_tmp_path))


@contextlib.asynccontextmanager
async def daemon(host: Path, options: DirectOptions | None = None) -> AsyncIterator[DirectLauncher]:
    profiles = await in_thread(load_direct_profiles, host / "profiles")
    socket = host / "direct.sock"
    options = options or DirectOptions()
    launcher = DirectLauncher(profiles, host, socket, KERNEL_PARTS, options, start_deadline_s=5)
    async with HandoffListener(socket, on_client=launcher.take):
        yield launcher
        await launcher.close()


async def test_a_process_that_was_never_noted_is_known_by_its_own_word(host: Path) -> None:
    """The daemon was killed between the start and the note of it."""
    async with daemon(host) as launcher:
        vmm = await launcher.launch(SPEC, "one", incoming=False)
    record = host / "direct" / "vm" / "one" / "launch.json"
    fields = json.loads(record.read_text())
    record.write_text(json.dumps({**fields, "process": None}))
    async with daemon(host) as launcher:
        (found,) = await launcher.find()
        assert (found.pid, found.instance) == (vmm.pid, "one")
        assert launcher.is_managed(found)
        assert json.loads(record.read_text())["process"]["pid"] == vmm.pid
        await found.quit()
        assert found.is_dead
        await launcher.forget(found)
    assert not record.exists()


async def test_a_process_that_never_hands_over_did_not_start(host: Path) -> None:
    write_profile(host, '"/bin/sh", "-c", "echo I am lost >&2; exec sleep 60"')
    async with daemon(host) as launcher:
        with pytest.raises(VmmDied, match="I am lost"):
            await launcher.launch(SPEC, "one", incoming=True)
    assert not (host / "direct" / "vm").exists()


async def test_one_who_speaks_for_another_process_is_not_believed(host: Path) -> None:
    """A script that does not `exec` the program: who was started is not who hands over."""
    guest = f"{sys.executable} -m migrd.demo.direct_guest {SMALL.replace(',', '')}"
    write_profile(host, f'"/bin/sh", "-c", {json.dumps(guest + "; true")}')
    async with daemon(host) as launcher:
        with pytest.raises(VmmTimedOut, match="not proven that nothing is left"):
            await launcher.launch(SPEC, "one", incoming=False)
        left = await in_thread(processes.guests_of, host)
        for pid in left:
            os.kill(pid, signal.SIGKILL)


async def test_a_guest_larger_than_the_host_allows_is_refused_before_anything_starts(
    host: Path,
) -> None:
    async with daemon(host, DirectOptions(largest_guest_bytes=8 << 20)) as launcher:
        with pytest.raises(Invalid, match="largest_guest_mib is 8"):
            await launcher.launch(SPEC, "one", incoming=False)
    assert not (host / "direct").exists()
