"""A host's passthrough hardware as a tree of files: /sys, /dev and /proc below one directory.

    host = FakeHost(tmp_path)
    host.add_vtd("dmar0", ecap=...)
    pf = host.add_function("0000:41:00.0", iommu="dmar0", group=7)
    vf = host.add_function("0000:41:00.1", iommu="dmar0", group=8, physical_function=pf)
    host.bind(vf, "vfio-pci")
    HostInventory(host.roots)

The rules are the kernel's: the real directories stand below /sys/devices and the buses and classes
have links to them; a VFIO driver registers a `vfio-dev` with the next free number and makes a
character device; to unbind takes both away; a PF has a link to each of its VFs; every member of a
group is linked in the group's own directory, bridges too.

What a test breaks afterwards it breaks by hand: `host.device_path(bdf)` is the directory.
"""

import os
import shutil
from pathlib import Path
from typing import Final

from migrd.core.devices import Inventory
from migrd.kernel.host_scan import scan_host
from migrd.kernel.probed import Answers, assemble
from migrd.kernel.sysfs import Roots

MTTY: Final = "mtty"
VTD_CAP: Final = 0xD2008C222F0606  # of a VT-d unit that QEMU emulates
VTD_ECAP_PLAIN: Final = 0xF00F4A
VTD_ECAP_TRACKS: Final = 0xF00F4A | 1 << 43 | 1 << 45 | 1 << 48
AMD_EFR_PLAIN: Final = 0x29D3
AMD_EFR_TRACKS: Final = 0x29D3 | 1 << 52


class FakeHost:
    """Builds the tree; each call changes it at once, as the kernel would."""

    def __init__(self, root: Path, *, release: str = "6.12.117", iommufd: bool = True) -> None:
        self.root = root
        self.sys, self.dev, self.proc = (root / name for name in ("sys", "dev", "proc"))
        self.roots = Roots.below(root)
        self._next_vfio = 0
        for directory in (
            self.sys / "class" / "iommu",
            self.sys / "class" / "vfio-dev",
            self.sys / "bus" / "pci" / "devices",
            self.sys / "bus" / "mdev" / "devices",
            self.sys / "kernel" / "iommu_groups",
            self.dev / "vfio" / "devices",
        ):
            directory.mkdir(parents=True, exist_ok=True)
        self.write(self.proc / "sys" / "kernel" / "osrelease", f"{release}\n")
        self.write(self.proc / "cmdline", "console=ttyS0\n")
        self.write(
            self.proc / "devices", "Character devices:\n 10 misc\n510 vfio-dev\n\nBlock devices:\n"
        )
        if iommufd:
            self.write(self.dev / "iommu", "")

    def look(self) -> Inventory:
        """What one scan makes of it, before anybody has probed anything."""
        return assemble(scan_host(self.roots), Answers())

    @staticmethod
    def write(path: Path, content: str | bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    # IOMMUs --------------------------------------------------------------------------------------

    def add_iommu(self, name: str, driver: str | None = None) -> Path:
        """An instance without registers; `driver` is that of the device that it is."""
        directory = self.sys / "devices" / "virtual" / "iommu" / name
        (directory / "devices").mkdir(parents=True)
        self.link(self.sys / "class" / "iommu" / name, directory)
        if driver is not None:
            parent = self.sys / "devices" / "platform" / f"of-{name}"
            parent.mkdir(parents=True)
            self.link(parent / "driver", self.sys / "bus" / "platform" / "drivers" / driver)
            self.link(directory / "device", parent)
        return directory

    def add_vtd(self, name: str, ecap: int = VTD_ECAP_PLAIN, cap: int = VTD_CAP) -> Path:
        directory = self.add_iommu(name)
        for file, text in (("version", "1:0"), ("cap", f"{cap:x}"), ("ecap", f"{ecap:x}")):
            self.write(directory / "intel-iommu" / file, f"{text}\n")
        return directory

    def add_amd(self, name: str, features: str) -> Path:
        directory = self.add_iommu(name)
        self.write(directory / "amd-iommu" / "cap", "9d1\n")
        self.write(directory / "amd-iommu" / "features", f"{features}\n")
        return directory

    # PCI functions -------------------------------------------------------------------------------

    def device_path(self, address: str) -> Path:
        """The real directory of a PCI function or an mdev."""
        kind = "pci" if ":" in address else "mdev"
        return (self.sys / "bus" / kind / "devices" / address).resolve()

    def add_function(
        self,
        address: str,
        *,
        iommu: str | None = None,
        group: int | None = None,
        driver: str | None = None,
        physical_function: str | None = None,
        class_code: int = 0x020000,
        ids: tuple[int, int] = (0x8086, 0x10D3),
        numa_node: int = 0,
    ) -> str:
        """A PCI function; returns its address."""
        directory = self.sys / "devices" / f"pci{address.rpartition(':')[0]}" / address
        directory.mkdir(parents=True)
        for name, text in (
            ("modalias", modalias(ids, class_code)),
            ("numa_node", f"{numa_node}"),
            ("driver_override", "(null)"),
            ("reset_method", "flr bus"),
        ):
            (directory / name).write_text(text + "\n")
        if iommu is not None:
            self.link(directory / "iommu", self.sys / "devices" / "virtual" / "iommu" / iommu)
        if group is not None:
            self.join_group(directory, group)
        if physical_function is not None:
            self._link_function(directory, physical_function)
        self.link(self.sys / "bus" / "pci" / "devices" / address, directory)
        if driver is not None:
            self.bind(address, driver)
        return address

    def join_group(self, directory: Path, group: int) -> None:
        of_group = self.sys / "kernel" / "iommu_groups" / str(group)
        (of_group / "devices").mkdir(parents=True, exist_ok=True)
        self.link(of_group / "devices" / directory.name, directory)
        self.link(directory / "iommu_group", of_group)

    def bind(self, address: str, driver: str) -> str | None:
        """To a driver; the name of its VFIO device, if it is a VFIO driver."""
        directory = self.device_path(address)
        bus = "pci" if ":" in address else "mdev"
        of_driver = self.sys / "bus" / bus / "drivers" / driver
        of_driver.mkdir(parents=True, exist_ok=True)
        self.link(directory / "driver", of_driver)
        if "vfio" not in driver and driver != MTTY:
            return None
        name = f"vfio{self._next_vfio}"
        self._next_vfio += 1
        self.write(directory / "vfio-dev" / name / "dev", f"510:{name[4:]}\n")
        self.write(self.dev / "vfio" / "devices" / name, "")
        return name

    def unbind(self, address: str) -> None:
        directory = self.device_path(address)
        (directory / "driver").unlink()
        if (directory / "vfio-dev").exists():
            for registered in (directory / "vfio-dev").iterdir():
                (self.dev / "vfio" / "devices" / registered.name).unlink()
            shutil.rmtree(directory / "vfio-dev")

    def remove(self, address: str) -> None:
        """Unplug it."""
        directory = self.device_path(address)
        group = directory / "iommu_group"
        if group.is_symlink():
            (group.resolve() / "devices" / address).unlink()
        bus = "pci" if ":" in address else "mdev"
        (self.sys / "bus" / bus / "devices" / address).unlink()
        shutil.rmtree(directory)

    def _link_function(self, directory: Path, physical_function: str) -> None:
        pf = self.device_path(physical_function)
        number = len(list(pf.glob("virtfn*")))
        self.link(pf / f"virtfn{number}", directory)
        self.link(directory / "physfn", pf)

    # mdevs ---------------------------------------------------------------------------------------

    def add_mdev(self, uuid: str, *, group: int | None = None, driver: str = MTTY) -> str:
        """Of mtty's type mtty-2, bound to its driver as the kernel does; returns the UUID."""
        parent = self.sys / "devices" / "virtual" / MTTY / MTTY
        types = parent / "mdev_supported_types" / "mtty-2"
        types.mkdir(parents=True, exist_ok=True)
        directory = parent / uuid
        directory.mkdir()
        self.link(directory / "mdev_type", types)
        if group is not None:
            self.join_group(directory, group)
        self.link(self.sys / "bus" / "mdev" / "devices" / uuid, directory)
        self.bind(uuid, driver)
        return uuid

    def link(self, place: Path, target: Path) -> None:
        """A relative link, as the kernel makes them."""
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(target, place.parent))


def modalias(ids: tuple[int, int], class_code: int) -> str:
    base, sub, interface = class_code >> 16, class_code >> 8 & 0xFF, class_code & 0xFF
    return (
        f"pci:v{ids[0]:08X}d{ids[1]:08X}sv00001AF4sd00001100bc{base:02X}sc{sub:02X}i{interface:02X}"
    )


def bdf(number: int) -> str:
    """The n-th of a long row of addresses."""
    bus, function = divmod(number, 256)
    return f"0000:{bus:02x}:{function >> 3:02x}.{function & 7}"


def large_host(root: Path, functions: int, iommus: int = 8, per_function: int = 64) -> FakeHost:
    """A host with many VFs: one PF to each `per_function` addresses, each in a group of its own."""
    host = FakeHost(root)
    names = [f"dmar{number}" for number in range(iommus)]
    for name in names:
        host.add_vtd(name)
    pf = ""
    for number in range(functions):
        is_pf = number % per_function == 0
        address = host.add_function(
            bdf(number),
            iommu=names[number * iommus // functions],
            group=number,
            driver="mlx5_core" if is_pf else "mlx5_vfio_pci",
            physical_function=None if is_pf else pf,
            ids=(0x15B3, 0x101D if is_pf else 0x101E),
        )
        pf = address if is_pf else pf
    return host
