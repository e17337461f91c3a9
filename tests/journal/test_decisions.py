"""The decision that stands for a VM survives, whole, and an older journal is still read."""

import json
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from migrd.core.devices import Capability
from migrd.core.facts import SpecDevice, VmSpec
from migrd.core.migration import Request
from migrd.core.standing import StandingDecision, standing
from migrd.core.tracking import DomainFlag, TrackingPolicy, TrackingRequest, VmDevice, decide
from migrd.core.vfio_launch import QemuVfioFeature
from migrd.engine.ports import StoredIncoming, StoredRequest, StoredVm
from migrd.journal import codec
from migrd.journal.codec import Sealed
from migrd.journal.sqlite import open_journal
from tests.fakes.inventory import CAN, CANNOT, LIVE, pci
from tests.journal.files import NAME
from tests.journal.samples import incoming, request

DEVICES = (
    SpecDevice("hostdev0", "0000:41:00.1", "pcie.0", "05.0"),
    SpecDevice("hostdev1", "0000:81:00.0"),
)
SPEC = VmSpec("web-1", "small", {"memory_mib": 64}, DEVICES, TrackingPolicy.ALWAYS)


def decision() -> StandingDecision:
    """With every kind of value in it: page tables with flags, ladders, reasons, evidence."""
    capable = pci("0000:41:00.1", CAN, migration=LIVE, dma_logging=Capability.probed(False))
    cannot = pci("0000:81:00.0", CANNOT, migration=LIVE, dma_logging=Capability.probed(False))
    asked = TrackingRequest(
        devices=(VmDevice("hostdev0", capable, "pcie.0", "05.0"), VmDevice("hostdev1", cannot)),
        qemu=frozenset(QemuVfioFeature),
        policy=TrackingPolicy.ALWAYS,
        iommus={CAN.name: CAN, CANNOT.name: CANNOT},
        memory_bytes=4 << 30,
        wants=frozenset({DomainFlag.NEST_PARENT, DomainFlag.PASID}),
    )
    return standing(asked, decide(asked), 1000.5, probed=True)


def stored() -> StoredVm:
    return StoredVm(SPEC, 3, True, "ab12", decision())


async def test_a_vm_with_devices_comes_back_with_its_decision(tmp_path: Path) -> None:
    assert decision().plan.ladders, "the sample is rich"
    assert any(len(domain.flags) > 1 for domain in decision().plan.domains)
    async with open_journal(tmp_path / NAME) as journal:
        await journal.put_vm(stored())
    async with open_journal(tmp_path / NAME) as journal:
        assert (await journal.replay()).vms == [stored()]


async def test_migrations_carry_devices_and_what_was_agreed(tmp_path: Path) -> None:
    ask = Request(
        "web-1", "host-b", destination_devices={"hostdev0": "0000:02:00.1"},
        accept_less_migratable=True,
    )  # fmt: skip
    first = request()
    out = StoredRequest("m1", ask, SPEC, 1, first.created_wall_s)
    there = StoredIncoming(**{**vars(incoming()), "spec": SPEC, "decision": decision()})
    async with open_journal(tmp_path / NAME) as journal:
        await journal.create_outgoing(out)
        await journal.create_incoming(there)
    async with open_journal(tmp_path / NAME) as journal:
        replay = await journal.replay()
    assert [one for one, _ in replay.outgoing] == [out]
    assert [one for one, _ in replay.incoming] == [there]


def _sealed(kind: str, fields: dict[str, object]) -> Sealed:
    body = json.dumps(fields).encode()
    return Sealed(kind, 1, body, zlib.crc32(body, zlib.crc32(f"{kind}/1".encode())))


def test_records_from_before_devices_are_still_read() -> None:
    spec = {"name": "web-1", "profile": "small", "parameters": {"memory_mib": 64}}
    old = codec.VM.read(_sealed("vm", {"spec": spec, "epoch": 1, "here": True, "instance": "ab12"}))
    assert old == StoredVm(VmSpec("web-1", "small", {"memory_mib": 64}), 1, True, "ab12", None)
    asked = json.loads(codec.REQUEST.write(request()).body)
    for name in ("destination_devices", "accept_less_migratable"):
        del asked["request"][name]
    for name in ("devices", "tracking_policy"):
        del asked["spec"][name]
    assert codec.REQUEST.read(_sealed("request", asked)) == request()


def test_a_record_is_read_by_a_process_that_orders_its_sets_otherwise() -> None:
    """Sets of words are written in an order of the process; another one has another."""
    sealed = codec.VM.write(stored())
    program = (
        "import sys; from migrd.journal import codec; from migrd.journal.codec import Sealed;"
        f"codec.VM.read(Sealed('vm', 1, sys.stdin.buffer.read(), {sealed.crc}))"
    )
    for seed in ("1", "2", "3", "4"):
        subprocess.run(
            [sys.executable, "-c", program],
            input=sealed.body,
            env={"PYTHONHASHSEED": seed},
            check=True,
            timeout=60,
        )


def test_a_set_that_lost_a_word_is_still_found_out() -> None:
    fields = json.loads(codec.VM.write(stored()).body)
    flags = next(d["flags"] for d in fields["decision"]["plan"]["domains"] if d["flags"])
    flags.append("from_the_future")
    with pytest.raises(codec.UnreadableRecord, match="flags"):
        codec.VM.read(_sealed("vm", fields))
