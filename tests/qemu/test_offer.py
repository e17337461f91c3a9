"""The long schema is asked for only where it is not known from the very same build."""

from pathlib import Path
from typing import Any

from migrd.processes.process import Life, WatchedProcess
from migrd.qemu.attachment import Attachment
from migrd.qemu.machine import Machine
from migrd.qemu.probe import Probed
from migrd.qemu.schema import read_schema
from tests.fakes.qmp_server import GREETING
from tests.fakes.qmp_vm import FakeNetwork, FakeVm

HERE: Any = {**GREETING}


async def asked(directory: Path, *, greeted: object) -> tuple[list[str], bool]:
    """What a machine asks a fake QEMU for its schema, twice, when its binary greeted so; and
    whether the answer is what the probe had found."""
    vm = FakeVm(FakeNetwork())
    probed = Probed("10.0.2", read_schema([]), greeted)
    async with vm.qmp.serving(directory / "q"):
        process = WatchedProcess(None, Life.UNKNOWN, None, is_ours=True)
        machine = Machine(Attachment("vm", "1", directory / "q", None, process), expected=probed)
        machine.start()
        try:
            await machine.wait_connected(within_s=5.0)
            first = await machine.schema()
            assert await machine.schema() is first
            return vm.qmp.received[1:], first == probed.schema
        finally:
            await machine.close()
            process.close()


async def test_a_qemu_of_a_probed_binary_is_not_asked_again(tmp_path: Path) -> None:
    assert await asked(tmp_path, greeted=HERE) == ([], True)


async def test_another_version_or_package_than_the_probe_met_is_asked(tmp_path: Path) -> None:
    others: list[object] = [{**HERE, "package": "another"}, {"qemu": {}}, None]
    for odd in others:
        assert await asked(tmp_path, greeted=odd) == (["query-qmp-schema"], False)
