"""The two hosts of the e2e tests as files, and the process that their daemons come from.

lay_out    configuration, profiles and certificates, as the demo has them, with passthrough
           allowed, patience, and a trace of each QEMU in `trace-<pid>`
nursery    a tests.lab.guest.e2e_migrd
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from migrd.demo import hosts
from migrd.demo.hosts import Host
from migrd.demo.image import GuestImage
from tests.lab.guest.e2e_devices import DMA_BYTES
from tests.setup.debian import qemu_binaries

QUIET = GuestImage(
    working_set_pages=16,
    cold_pages=DMA_BYTES // 4096 - 16,
    pages_per_s=100,
    heartbeat_interval_s=0.05,
    noise=True,
)
"""It hardly dirties anything: what is dirty is the device's doing."""
_PROFILE = """\
    # mtty's own log of its DMA is a stub: left alone
    "-global", "vfio-pci.x-device-dirty-page-tracking=off",
    # slots of their own, which have no power before a guest gives it: a device leaves at once
    "-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off",
    "-device", "pcie-root-port,id=port1,chassis=1,slot=1",
    "-device", "pcie-root-port,id=port2,chassis=2,slot=2",
    "-D", "{trace}",
{traces}
"""
_TRACES = (
    "iommufd_backend_alloc_hwpt",
    "iommufd_backend_set_dirty",
    "iommufd_backend_get_dirty_bitmap",
)
_PATIENT = """\
stall_s = 60.0
preflight_deadline_s = 90.0
prepare_deadline_s = 120.0
switchover_deadline_s = 90.0
rollback_deadline_s = 90.0
"""
_SAMPLING = """
[devices]
sample_interval_s = 1.0
"""


def lay_out(directory: Path) -> dict[str, Host]:
    """Blocking."""
    binary = str(qemu_binaries()["10"])
    lines = {"migration": _PATIENT, "end": _SAMPLING}
    pair = hosts.lay_out(
        directory,
        names=("alpha", "beta"),
        binaries=(binary, binary),
        machine="pc-q35-10.0",
        tls=False,
        more={"alpha": lines, "beta": lines},
    )
    traces = "".join(f'    "-trace", "{event}",\n' for event in _TRACES)
    more = _PROFILE.format(trace=directory / "trace-%d", traces=traces)
    for host in pair:
        profile = host.directory / "profiles" / "demo.toml"
        text = profile.read_text().replace('    "-nodefaults",\n', f'    "-nodefaults",\n{more}')
        profile.write_text(text + "\n[passthrough]\nallowed = true\n")
    QUIET.write_rom(directory / "firmware" / "guest.rom")
    return {host.name: host for host in pair}


@contextlib.contextmanager
def nursery() -> Iterator[subprocess.Popen[str]]:
    # what names settings of this run's would be taken for settings of migrd's
    environment = {name: it for name, it in os.environ.items() if not name.startswith("MIGRD_")}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.lab.guest.e2e_migrd"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as born:
        assert born.stdout is not None
        assert born.stdout.readline() == "ready\n"
        yield born
        # its end follows from that of its stdin
