"""Passthrough devices and real QEMUs: given at the start, plugged, unplugged, migrated, reset.

The devices are stand-ins (tests/lab/vfio_shim): QEMU's own code for VFIO runs, on no hardware.

Longer than other tests because it follows a device through all of its life with a QEMU.
"""

import asyncio
import os
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from migrd.core.facts import PassthroughFacts, QemuStatus, RunState, TransferSample
from migrd.core.vfio_launch import QemuVfioFeature, VfioLaunch
from migrd.engine.ports import Vmm
from migrd.engine.threads import in_thread
from migrd.errors import Invalid, VmmDied, VmmRefused, VmmTimedOut
from migrd.processes.memlock import OTHER_BYTES
from migrd.qemu.launch import QemuLauncher
from migrd.qemu.profile import TCG_EXTRA_KIB
from tests.contract.test_machine import FAST, seen, state_reached, status_seen
from tests.contract.vmm_world import MIB
from tests.lab import vfio_shim
from tests.qemu.hosts import Host, host_of, machine_of, until
from tests.qemu.vfio import (
    FIRST,
    SECOND,
    Open,
    add_vfio_profile,
    checksums,
    device,
    open_in,
    passed,
    plugged,
)

PLENTY_S = 30.0
CAP_SYS_RESOURCE = 24
PATIENT_S = 15.0
"""For a QEMU that shares its processor with many others."""


@pytest.fixture(scope="module")
def shim() -> Path:
    return vfio_shim.build()


@pytest.fixture
def host(short_tmp_path: Path, qemu_binaries: dict[str, Path]) -> Iterator[Host]:
    with host_of(short_tmp_path, qemu_binaries["10"]) as made:
        yield made


@pytest.fixture
def old_host(short_tmp_path: Path, qemu_binaries: dict[str, Path]) -> Iterator[Host]:
    """With QEMU 7.2, which knows nothing of iommufd."""
    with host_of(short_tmp_path, qemu_binaries["7.2"]) as made:
        yield made


async def ended(launcher: QemuLauncher, *vmms: Vmm) -> None:
    for vmm in vmms:
        await vmm.quit()
        await launcher.forget(vmm)


async def only_device(vmm: Vmm) -> PassthroughFacts:
    (found,) = (await vmm.facts()).devices
    return found


def own_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def memlock_of(pid: int | None) -> int:
    assert pid is not None
    return resource.prlimit(pid, resource.RLIMIT_MEMLOCK)[0]


def enough_or_most(needed_bytes: int) -> int:
    """What a limit is raised to: without CAP_SYS_RESOURCE no further than the hard one."""
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    status = Path("/proc/self/status").read_text()
    capabilities = int(status.partition("CapEff:")[2].split()[0], 16)
    may_raise = bool(capabilities & 1 << CAP_SYS_RESOURCE)
    if may_raise or hard == resource.RLIM_INFINITY:
        return needed_bytes
    return min(needed_bytes, hard)


@pytest.fixture
def little_to_lock() -> Iterator[int]:
    """This process may lock little, as most may."""
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    little = 64 * 1024
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (little, before[1]))
    yield little
    assert resource.getrlimit(resource.RLIMIT_MEMLOCK) == (little, before[1])
    resource.setrlimit(resource.RLIMIT_MEMLOCK, before)


# What a QEMU offers


async def test_what_a_qemu_offers_for_passthrough_is_found_by_asking_it(host: Host) -> None:
    async with host.daemon(call_deadline_s=PATIENT_S) as launcher:
        assert await launcher.vfio_features(host.spec()) == frozenset(QemuVfioFeature)


async def test_an_older_qemu_is_found_to_offer_nothing_of_it(old_host: Host) -> None:
    async with old_host.daemon() as launcher:
        assert await launcher.vfio_features(old_host.spec()) == frozenset()


# At the start


async def test_a_qemu_inherits_its_devices_and_nothing_else_of_ours(
    host: Host, shim: Path, little_to_lock: int
) -> None:
    add_vfio_profile(host, "dev", shim)
    async with host.daemon(call_deadline_s=PATIENT_S) as launcher:
        await launcher.probe(host.spec())
        with passed(device()) as given:
            before = own_fds()
            vmm = await launcher.launch(
                host.spec(profile="dev"), "one", incoming=False, devices=given
            )
            assert own_fds() - before <= 3  # two monitors and a pidfd: no copy of the devices
        assert open_in(vmm.pid) == Open(devices=1, iommufds=1)
        found = await only_device(vmm)
        assert (found.id, found.address, found.iommufd) == ("hostdev0", FIRST, "iommufd0")
        assert found.migrates is True
        assert (found.guest_bus, found.guest_address) == ("pci.0", "02.0")
        assert memlock_of(vmm.pid) == enough_or_most(64 * MIB + TCG_EXTRA_KIB * 1024 + OTHER_BYTES)
        plain = await launcher.launch(host.spec("other", "dev"), "two", incoming=True)
        assert open_in(plain.pid) == Open(devices=0, iommufds=0)
        assert memlock_of(plain.pid) == little_to_lock
        await ended(launcher, vmm, plain)


async def test_descriptors_that_are_closed_or_do_not_fit_start_nothing(
    host: Host, shim: Path
) -> None:
    add_vfio_profile(host, "dev", shim)
    async with host.daemon(call_deadline_s=PATIENT_S) as launcher:
        await launcher.probe(host.spec())
        before, spec = own_fds(), host.spec(profile="dev")
        with passed(device()) as given:
            for wrong in (replace(given, iommufds=()), replace(given, device_fds={})):
                with pytest.raises(Invalid) as refused:
                    await launcher.launch(spec, "one", incoming=False, devices=wrong)
                assert {v.code for v in refused.value.violations} == {"bad_descriptors"}
        with pytest.raises(VmmDied, match="cannot be passed on") as died:
            await launcher.launch(spec, "one", incoming=False, devices=given)
        assert died.value.code == "vmm_not_started"
        assert not list(host.run.glob("vms/*/*"))
        assert own_fds() == before


async def test_a_device_that_cannot_be_bound_is_told_in_qemus_words(host: Host, shim: Path) -> None:
    add_vfio_profile(host, "dev", shim, fail="BIND")
    async with host.daemon(call_deadline_s=PATIENT_S) as launcher:
        before = own_fds()
        with passed(device()) as given, pytest.raises(VmmDied, match="Device or resource busy"):
            await launcher.launch(host.spec(profile="dev"), "one", incoming=False, devices=given)
        assert own_fds() == before


async def test_an_older_qemu_is_refused_before_it_is_started(old_host: Host, shim: Path) -> None:
    add_vfio_profile(old_host, "dev", shim)
    async with old_host.daemon() as launcher:
        spec = old_host.spec(profile="dev")
        with passed(device()) as given, pytest.raises(VmmRefused, match="device_fd, iommufd") as no:
            await launcher.launch(spec, "one", incoming=False, devices=given)
        assert no.value.code == "passthrough_unsupported"
        assert not list(old_host.run.glob("vms/*/*"))


async def test_a_profile_that_allows_no_devices_refuses_them_all(host: Host, shim: Path) -> None:
    add_vfio_profile(host, "dev", shim)
    host.add_profile("some", more=f'[passthrough]\nallowed = true\naddresses = ["{SECOND}"]\n')
    async with host.daemon(call_deadline_s=PATIENT_S) as launcher:
        with passed(device()) as given:
            for profile, code in (("lab", "passthrough_forbidden"), ("some", "device_not_allowed")):
                spec = host.spec(profile=profile)
                with pytest.raises(Invalid) as refused:
                    await launcher.launch(spec, "one", incoming=False, devices=given)
                assert [v.code for v in refused.value.violations] == [code]
        assert not list(host.run.glob("vms/*/*"))


async def test_the_next_daemon_knows_the_devices_and_what_qemu_calls_them(
    host: Host, shim: Path
) -> None:
    add_vfio_profile(host, "dev", shim, flags=0)
    two = (device(), device("hostdev1", SECOND, "iommufd1"))
    async with host.daemon(call_deadline_s=PATIENT_S) as launcher:
        with passed(*two) as given:
            spec = host.spec(profile="dev")
            vmm = await launcher.launch(spec, "one", incoming=False, devices=given)
        assert launcher.devices_of(vmm) == given.launch
    async with host.daemon(call_deadline_s=PATIENT_S) as another:
        (vmm,) = await another.find()
        assert another.devices_of(vmm) == given.launch
        facts = await vmm.facts()
        assert {d.id: d.address for d in facts.devices} == {"hostdev0": FIRST, "hostdev1": SECOND}
        assert all(d.migrates is False and len(d.blocked_reasons) == 1 for d in facts.devices)
        fewer = VfioLaunch(("iommufd0",), True, two[:1])
        await another.note_devices(vmm, fewer)
    async with host.daemon(call_deadline_s=PATIENT_S) as third:
        (vmm,) = await third.find()
        assert third.devices_of(vmm) == fewer
        await ended(third, vmm)


# What it says of them


async def test_a_device_that_cannot_migrate_is_named_with_qemus_reason(
    host: Host, shim: Path
) -> None:
    add_vfio_profile(host, "dev", shim, flags=0)
    async with host.daemon(call_deadline_s=PATIENT_S) as launcher:
        with passed(device()) as given:
            vmm = await launcher.launch(
                host.spec(profile="dev"), "one", incoming=False, devices=given
            )
        found = await only_device(vmm)
        assert found.migrates is False
        assert "VFIO migration is not supported in kernel" in found.blocked_reasons[0]
        await ended(launcher, vmm)


async def test_a_device_whose_dma_nobody_tracks_is_named_with_qemus_reason(
    host: Host, shim: Path
) -> None:
    add_vfio_profile(host, "dev", shim, nolog=1)
    async with host.daemon(call_deadline_s=PATIENT_S) as launcher:
        with passed(device()) as given:
            vmm = await launcher.launch(
                host.spec(profile="dev"), "one", incoming=False, devices=given
            )
        found = await only_device(vmm)
        assert found.migrates is False
        assert "dirty tracking" in found.blocked_reasons[0]
        await ended(launcher, vmm)


# Migration


async def migrated(source: Vmm, destination: Vmm) -> list[TransferSample]:
    """All samples of the source, of a migration that completes."""
    address = await destination.prepare_incoming(FAST, None, "127.0.0.1")
    await source.prepare_outgoing(FAST, None)
    samples: list[TransferSample] = []
    has_continued = False
    async with source.feed() as feed, destination.feed() as arriving:
        await source.start_outgoing(address)
        while not samples or samples[-1].qemu_status is not QemuStatus.COMPLETED:
            sample = await feed.newer(within_s=PLENTY_S)
            assert sample is not None, samples[-1:]
            samples.append(sample)
            if sample.qemu_status is QemuStatus.PRE_SWITCHOVER and not has_continued:
                await source.continue_switchover()
                has_continued = True
        await status_seen(arriving, QemuStatus.COMPLETED)
    return samples


async def test_a_guest_migrates_with_its_device_and_each_state_of_it_is_told(
    host: Host, shim: Path
) -> None:
    log = add_vfio_profile(host, "dev", shim, precopy=MIB, stopcopy=MIB)
    async with host.daemon(call_deadline_s=PATIENT_S) as launcher:
        spec = host.spec(profile="dev")
        with passed(device()) as given:
            source = await launcher.launch(spec, "one", incoming=False, devices=given)
        with passed(device(address=SECOND)) as given:
            destination = await launcher.launch(spec, "two", incoming=True, devices=given)
        samples = await migrated(source, destination)
        states = list(dict.fromkeys(dict(s.device_states).get("hostdev0") for s in samples))
        told = [state for state in states if state in ("pre-copy", "pre-copy-p2p", "stop-copy")]
        assert told == ["pre-copy", "pre-copy-p2p", "stop-copy"]
        sent_bytes = (await source.sample()).device_transferred_bytes
        assert sent_bytes is not None
        assert sent_bytes >= MIB
        assert not any(s.reset_devices for s in samples)
        await state_reached(machine_of(destination), RunState.PAUSED)
        await destination.run_guest()
        await until(lambda: len(checksums(log, "received")) == 1, "the device has loaded its state")
        assert (await only_device(destination)).device_state == "running"
        await source.quit()
        await until(lambda: len(checksums(log, "sent")) == 1, "the device has told what it sent")
        assert checksums(log, "sent") == checksums(log, "received")
        await launcher.forget(source)
        await ended(launcher, destination)


async def test_a_device_that_had_to_be_reset_is_told_and_the_vm_migrates_again(
    host: Host, shim: Path
) -> None:
    fault = host.root / "fault"
    fault.touch()
    add_vfio_profile(
        host, "dev", shim, precopy=MIB, stopcopy=MIB, fail="STOP_COPY", fail_if=str(fault)
    )
    async with host.daemon(call_deadline_s=PATIENT_S) as launcher:
        spec = host.spec(profile="dev")
        with passed(device()) as given:
            source = await launcher.launch(spec, "one", incoming=False, devices=given)
            destination = await launcher.launch(spec, "two", incoming=True, devices=given)
        address = await destination.prepare_incoming(FAST, None, "127.0.0.1")
        await source.prepare_outgoing(FAST, None)
        async with source.feed() as feed:
            await source.start_outgoing(address)
            await status_seen(feed, QemuStatus.PRE_SWITCHOVER)
            await source.continue_switchover()
            failed = await seen(feed, lambda s: s.error is not None, "QEMU's reason")
        assert failed.qemu_status is QemuStatus.FAILED
        assert failed.reset_devices == ("hostdev0",)
        await state_reached(machine_of(source), RunState.RUNNING)
        assert (await only_device(source)).was_reset
        await ended(launcher, destination)
        fault.unlink()
        with passed(device()) as given:
            destination = await launcher.launch(spec, "three", incoming=True, devices=given)
        address = await destination.prepare_incoming(FAST, None, "127.0.0.1")
        await source.prepare_outgoing(FAST, None)
        async with source.feed() as feed:
            await source.start_outgoing(address)
            await status_seen(feed, QemuStatus.PRE_SWITCHOVER)
            await source.continue_switchover()
            completed = await status_seen(feed, QemuStatus.COMPLETED)
        assert completed.reset_devices == ()
        assert (await only_device(source)).was_reset  # it stays true
        await ended(launcher, source, destination)


# While it runs


async def test_a_device_is_plugged_by_descriptor_and_unplugged_when_the_guest_lets_go(
    host: Host, shim: Path, little_to_lock: int
) -> None:
    add_vfio_profile(host, "dev", shim)
    async with host.daemon(call_deadline_s=PATIENT_S) as launcher:
        vmm = await launcher.launch(host.spec(profile="dev"), "one", incoming=False)
        before = own_fds()
        with plugged() as fds:
            await vmm.plug_device(device(), fds)
            await vmm.plug_device(device(), fds)  # said again
        assert own_fds() == before
        assert open_in(vmm.pid) == Open(devices=1, iommufds=1)
        found = await only_device(vmm)
        assert (found.id, found.address, found.migrates) == ("hostdev0", FIRST, True)
        needed = little_to_lock + 64 * MIB + TCG_EXTRA_KIB * 1024 + OTHER_BYTES
        assert memlock_of(vmm.pid) == enough_or_most(needed)

        with pytest.raises(VmmTimedOut, match="has not let go") as late:
            await vmm.unplug_device("hostdev0", within_s=0.2)
        assert late.value.code == "unplug_timed_out"
        assert (await only_device(vmm)).id == "hostdev0"
        unplugging = asyncio.create_task(vmm.unplug_device("hostdev0", within_s=PLENTY_S))
        await asyncio.sleep(0.1)
        await machine_of(vmm).monitor.execute("system_reset")  # as if the guest had let go
        await unplugging
        assert (await vmm.facts()).devices == ()
        assert await objects(vmm) == set()
        await vmm.unplug_device("hostdev0", within_s=1.0)  # said again
        assert open_in(vmm.pid).devices == 0
        await ended(launcher, vmm)


async def objects(vmm: Vmm) -> set[str]:
    rows = await machine_of(vmm).monitor.execute("qom-list", {"path": "/objects"})
    return {row["name"] for row in rows if row["name"].startswith("iommufd")}


async def test_two_devices_share_an_iommufd_object_and_it_stays_until_the_last_one_goes(
    host: Host, shim: Path
) -> None:
    add_vfio_profile(host, "dev", shim)
    async with host.daemon(call_deadline_s=PATIENT_S) as launcher:
        spec = host.spec(profile="dev")
        with passed(device()) as given:
            vmm = await launcher.launch(spec, "one", incoming=False, devices=given)
        second = device("hostdev1", SECOND)
        with plugged() as fds, pytest.raises(VmmRefused, match="has devices on it already"):
            await vmm.plug_device(second, fds)
        with plugged(new_iommufd=False) as fds:
            await vmm.plug_device(second, fds)
        assert open_in(vmm.pid) == Open(devices=2, iommufds=1)
        for left, id_ in ((1, "hostdev1"), (0, "hostdev0")):
            unplugging = asyncio.create_task(vmm.unplug_device(id_, within_s=PLENTY_S))
            await asyncio.sleep(0.1)
            await machine_of(vmm).monitor.execute("system_reset")
            await unplugging
            assert len((await vmm.facts()).devices) == left
            assert await objects(vmm) == ({"iommufd0"} if left else set())
        await ended(launcher, vmm)


async def test_a_device_that_qemu_does_not_take_leaves_nothing_behind(
    host: Host, shim: Path, little_to_lock: int
) -> None:
    fault = host.root / "fault"
    fault.touch()
    add_vfio_profile(host, "dev", shim, fail="BIND", fail_if=str(fault))
    async with host.daemon(call_deadline_s=PATIENT_S) as launcher:
        vmm = await launcher.launch(host.spec(profile="dev"), "one", incoming=False)
        no_such_bus = replace(device(), guest_bus="nowhere")
        unknown = replace(device(), properties={"no-such-property": "on"})
        for wanted, words in (
            (device(), "Device or resource busy"),
            (no_such_bus, "nowhere"),
            (unknown, "no-such-property"),
        ):
            with plugged() as fds, pytest.raises(VmmRefused, match=words) as refused:
                await vmm.plug_device(wanted, fds)
            assert refused.value.code == "plug_refused"
            assert await objects(vmm) == set()
            assert open_in(vmm.pid).devices == 0
            assert memlock_of(vmm.pid) == little_to_lock
        fault.unlink()
        with plugged() as fds:
            await vmm.plug_device(device(), fds)
        assert (await only_device(vmm)).migrates is True
        await ended(launcher, vmm)


async def test_a_device_stands_where_the_guest_is_to_see_it(host: Host, shim: Path) -> None:
    bridge = ('"-nodefaults"', '"-nodefaults", "-device", "pci-bridge,id=port1,chassis_nr=1"')
    add_vfio_profile(host, "dev", shim, changes=[bridge])
    async with host.daemon(call_deadline_s=PATIENT_S) as launcher:
        placed = replace(device(), guest_address="0b.0")
        with passed(placed) as given:
            spec = host.spec(profile="dev")
            vmm = await launcher.launch(spec, "one", incoming=False, devices=given)
        behind = replace(device("hostdev1", SECOND, "iommufd1"), guest_bus="port1")
        with plugged() as fds:
            await vmm.plug_device(replace(behind, guest_address="05.0"), fds)
        places = {d.id: (d.guest_bus, d.guest_address) for d in (await vmm.facts()).devices}
        assert places == {"hostdev0": ("pci.0", "0b.0"), "hostdev1": ("port1", "05.0")}
        await ended(launcher, vmm)


async def test_a_plugged_device_that_cannot_migrate_is_known_by_qemus_name_for_it(
    host: Host, shim: Path
) -> None:
    add_vfio_profile(host, "dev", shim, flags=0)
    async with host.daemon(call_deadline_s=PATIENT_S) as launcher:
        vmm = await launcher.launch(host.spec(profile="dev"), "one", incoming=False)
        with plugged() as fds:
            await vmm.plug_device(device(), fds)
        assert (await only_device(vmm)).migrates is False
        await ended(launcher, vmm)


async def test_an_older_qemu_takes_no_device_by_descriptor(old_host: Host) -> None:
    async with old_host.daemon() as launcher:
        vmm = await launcher.launch(old_host.spec(), "one", incoming=False)
        with plugged() as fds, pytest.raises(VmmRefused, match="does not offer") as refused:
            await vmm.plug_device(device(), fds)
        assert refused.value.code == "passthrough_unsupported"
        assert open_in(vmm.pid) == Open(devices=0, iommufds=0)
        await vmm.unplug_device("hostdev0", within_s=1.0)  # it is not there
        await ended(launcher, vmm)


async def test_a_device_is_neither_plugged_nor_unplugged_while_a_migration_runs(
    host: Host, shim: Path
) -> None:
    add_vfio_profile(host, "dev", shim, precopy=MIB, stopcopy=MIB)
    async with host.daemon(call_deadline_s=PATIENT_S) as launcher:
        spec = host.spec(profile="dev")
        with passed(device()) as given:
            source = await launcher.launch(spec, "one", incoming=False, devices=given)
            destination = await launcher.launch(spec, "two", incoming=True, devices=given)
        address = await destination.prepare_incoming(FAST, None, "127.0.0.1")
        await source.prepare_outgoing(FAST, None)
        async with source.feed() as feed:
            await source.start_outgoing(address)
            await status_seen(feed, QemuStatus.PRE_SWITCHOVER)
            other = device("hostdev1", SECOND, "iommufd1")
            with plugged() as fds, pytest.raises(VmmRefused, match="not allowed while migrating"):
                await source.plug_device(other, fds)
            with pytest.raises(VmmRefused, match="not allowed while migrating"):
                await source.unplug_device("hostdev0", within_s=1.0)
            await source.cancel_transfer()
            await status_seen(feed, QemuStatus.CANCELLED)
        assert [found.id for found in (await source.facts()).devices] == ["hostdev0"]
        await ended(launcher, source, destination)


async def test_the_digest_tells_devices_apart_and_not_where_they_are(
    host: Host, shim: Path
) -> None:
    add_vfio_profile(host, "dev", shim)
    spec = host.spec(profile="dev")

    def launch(*devices: tuple[str, str]) -> VfioLaunch:
        made = tuple(device(id_, address) for id_, address in devices)
        return VfioLaunch(("iommufd0",), True, made)

    async with host.daemon(call_deadline_s=PATIENT_S) as launcher:
        pair = await in_thread(launcher.check, spec, launch(("a", FIRST), ("b", SECOND)))
        assert pair == await in_thread(launcher.check, spec, launch(("a", SECOND), ("b", FIRST)))
        for other in (
            None,
            launch(("a", FIRST)),
            launch(("b", FIRST), ("a", SECOND)),
            launch(("a", FIRST), ("c", SECOND)),
        ):
            assert pair != await in_thread(launcher.check, spec, other)
