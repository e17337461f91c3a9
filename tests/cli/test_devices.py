"""`migrd devices`, and the hardware in `migrd host`, as people and scripts see them."""

import os
from dataclasses import replace

import pytest

from migrd.cli.exits import Exit
from migrd.core.devices import Capability, Inventory
from tests.cli.conftest import PROGRAM, Run, parsed
from tests.cli.scripted_daemon import Daemon
from tests.cli.scripted_view import ODD
from tests.cli.terminal import Terminal
from tests.fakes.inventory import CAN, NOT_KNOWN, inventory, mdev, mixed_host, pci

VF = "0000:41:00.1"
NVME = "0000:81:00.0"
GPU = "0000:c1:00.0"
MDEV = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


def become(daemon: Daemon, seen: Inventory) -> None:
    daemon.call(lambda engine: setattr(engine, "inventory", seen))


def row_of(out: str, address: str) -> list[str]:
    (line,) = [line for line in out.splitlines() if line.startswith(address)]
    return line.split()


# The host


def test_the_host_lists_its_iommus_with_what_each_can_and_why(run: Run) -> None:
    out = run("host").stdout
    dmar1 = next(line for line in out.splitlines() if line.startswith("dmar1"))
    assert "no" in dmar1.split()
    assert "ecap 0xf00f4a: no SSADS" in dmar1
    assert "tracking policy               auto" in out


def test_a_host_of_which_it_is_not_known_says_of_which_instance(run: Run, daemon: Daemon) -> None:
    become(daemon, inventory([CAN, NOT_KNOWN]))
    out = run("host").stdout
    assert f"unknown: not known of 1 of 2: {NOT_KNOWN.name}" in out
    become(daemon, inventory([]))
    out = run("host").stdout
    assert "unknown: this host shows no IOMMU" in out
    assert "IOMMUs\n" not in out


def test_what_the_kernel_lacks_is_said_and_what_it_has_is_not(run: Run, daemon: Daemon) -> None:
    assert "kernel                        6.12.117\n" in run("host").stdout
    lacking = replace(
        mixed_host().kernel,
        iommufd=Capability.probed(False, "/dev/iommu: No such file or directory"),
        unsafe_interrupts=True,
    )
    become(daemon, inventory([CAN], kernel=lacking))
    out = run("host").stdout
    assert "/dev/iommu: no (probed: /dev/iommu: No such file" in out
    assert "unsafe interrupts are allowed" in out


# The list


def test_devices_lists_them_by_address_with_a_verdict_each(run: Run) -> None:
    out = run("devices").stdout
    header = out.splitlines()[0].split()
    assert header == ["ADDRESS", "DRIVER", "READY", "GROUP", "IOMMU", "TRACKED", "BY", "VERDICT"]
    assert len(out.splitlines()) == 1 + len(mixed_host().devices)
    assert row_of(out, VF) == [
        VF, "mlx5_vfio_pci", "yes", "8", "dmar0", "iommu,", "device", "live"
    ]  # fmt: skip
    assert row_of(out, NVME)[5:] == ["nobody", "needs", "unplug"]


def test_devices_are_chosen_by_driver_iommu_and_readiness(run: Run) -> None:
    chosen = run("devices", "--passthrough", "--iommu", "dmar1", "-o", "json")
    assert [item["address"] for item in parsed(chosen)["items"]] == [NVME]
    lines = run("devices", "--driver", "mlx5_vfio_pci").stdout.splitlines()
    assert len(lines) == 3
    none = run("devices", "--driver", "none-such")
    assert (none.exit_code, none.stdout) == (0, "")
    assert "no such devices" in none.stderr


def test_who_uses_a_device_is_a_column_when_somebody_does(run: Run, daemon: Daemon) -> None:
    daemon.call(lambda engine: engine.devices_in_use.update({VF: "web1"}))
    out = run("devices").stdout
    assert row_of(out, VF)[-1] == "web1"
    assert row_of(out, NVME)[-1] == "-"


def test_every_page_of_a_long_list_is_read(run: Run, daemon: Daemon) -> None:
    many = [pci(f"0000:{n >> 3:02x}:{n >> 8:02x}.{n & 7}") for n in range(1500)]
    become(daemon, inventory([CAN], many))
    assert len(parsed(run("devices", "-o", "json"))["items"]) == 1500
    assert len(run("devices", "-o", "jsonl").stdout.splitlines()) == 1500


def test_without_devices_it_says_so(run: Run, daemon: Daemon) -> None:
    become(daemon, inventory([]))
    assert "no devices to pass through here" in run("devices").stderr


def test_the_table_fits_a_terminal_of_eighty_columns(daemon: Daemon) -> None:
    environment = {**os.environ, "MIGRD_SOCKET": str(daemon.socket)}
    for command in (["devices"], ["devices", VF], ["host"]):
        with Terminal([*PROGRAM, *command], environment, columns=80, lines=50) as terminal:
            assert terminal.ended() == 0
            lines = terminal.text.splitlines()
        assert max(len(line) for line in lines) <= 80
        if command == ["devices"]:
            assert "iommu" in lines[0]
            assert MDEV in "".join(line.split()[0] for line in lines if line)


# One device


def test_one_device_is_shown_with_its_reasons(run: Run) -> None:
    out = run("devices", GPU).stdout
    assert "ready for a VM         no" in out
    assert "IOMMU tracks its DMA   no (estimated: ecap 0xf00f4a: no SSADS)" in out
    assert "logs its own DMA       unknown (driver not bound)" in out
    assert "group                  33, with 0000:c1:00.1" in out
    assert "numa_node: empty" in out
    assert "Why" in out
    assert "[iommu_no_dirty_tracking]" in out


def test_a_device_without_a_driver_says_which_would_be_bound(run: Run, daemon: Daemon) -> None:
    bare = pci(VF, driver=None, driver_override="vfio-pci", vfio_cdev=None)
    become(daemon, inventory([CAN], [bare, mdev(MDEV, mdev_type="mtty-2")]))
    assert "none; only vfio-pci would be bound" in run("devices", VF).stdout
    assert "mtty-2" in run("devices", MDEV).stdout


def test_a_verdict_that_rests_on_the_unknown_has_a_question_mark(run: Run) -> None:
    assert row_of(run("devices").stdout, "0000:41:00.0")[-1].endswith("?")
    out = run("devices", "0000:41:00.0").stdout
    assert "? (proven only: " in out


def test_an_address_may_be_what_lspci_prints(run: Run) -> None:
    assert parsed(run("devices", "41:00.1", "-o", "json"))["address"] == VF
    assert parsed(run("devices", VF.upper(), "-o", "json"))["address"] == VF
    assert parsed(run("devices", MDEV, "-o", "json"))["address"] == MDEV


def test_probe_asks_the_kernel_and_shows_what_it_said(run: Run, daemon: Daemon) -> None:
    assert run("devices", "41:00.1", "--probe").exit_code == 0
    assert daemon.call(lambda engine: engine.probed) == [VF]
    daemon.call(lambda engine: engine.devices_in_use.update({VF: "web1"}))
    used = run("devices", VF, "--probe")
    assert used.exit_code == Exit.REFUSED
    assert "[device_in_use]" in used.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("0000:ff:00.0",), Exit.NOT_FOUND, "`migrd devices` lists"),
        (("eth0",), Exit.USAGE, "such as 0000:41:00.2"),
        (("--probe",), Exit.USAGE, "which device"),
        ((VF, "--driver", "x"), Exit.USAGE, "one device"),
        (("..",), Exit.USAGE, "no name"),
    ],
)
def test_what_is_wrong_has_its_code_and_says_what_to_do(
    run: Run, arguments: tuple[str, ...], code: Exit, said: str
) -> None:
    result = run("devices", *arguments)
    assert result.exit_code == code, result.output
    assert said in result.stderr.replace("\n", " ")
    assert result.stdout == ""


def test_text_of_sysfs_that_would_steer_the_terminal_is_shown_written_out(
    run: Run, daemon: Daemon
) -> None:
    odd = pci(VF, driver=ODD, trouble=(ODD,), vfio_cdev=ODD)
    strange = replace(CAN, dirty_tracking=Capability.estimated(True, ODD))
    become(daemon, inventory([strange], [odd], trouble=[ODD]))
    for command in (("devices",), ("devices", VF), ("host",)):
        out = run(*command).output
        assert "\\x1b[2J" in out
        assert not set("\x1b\x9b\u202e") & set(out)


def test_the_help_shows_how_it_is_used(run: Run) -> None:
    told = run("devices", "--help").output
    assert "migrd devices 41:00.2 --probe" in told
    assert "devices" in run("--help").output
