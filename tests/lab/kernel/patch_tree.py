# SPDX-License-Identifier: GPL-2.0
"""Puts the kernel's sample device behind the kernel's mock IOMMU, for the lab only.

    python patch_tree.py LINUX_6_12_TREE

Unpatched, the mock IOMMU of iommufd's selftest tracks dirty pages but serves only mock devices,
and the sample device mtty can migrate but has no IOMMU. Together they are what no emulated
machine offers: a VFIO device with a migration state *and* a page table that tracks dirty pages.
Three edits, each to be found in the tree by the word "lab:":

    iommufd_test.h  the mock aperture is 0..2^47 instead of 16 MiB..2 GiB: a VM's memory starts
                    at 0 and has its firmware just below 4 GiB
    selftest.c      the mock IOMMU takes mdevs too; one whose UUID starts with 0d0d0d0d cannot
                    track dirty pages
    mtty.c          with mtty.mock_iommu=1 an mtty is a physical VFIO device in the mock IOMMU;
                    without it, it is what it always was

Licence: what this writes becomes part of files under GPL-2.0, so this file is under GPL-2.0 as
well. Nothing of migrd imports it, and the patched tree is removed after the build.

An edit whose place is not found exactly as often as expected stops with the place's name: a
later kernel must be looked at by a person.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

MARK = "/* lab:"

_DEVICE_FLAGS = """/* lab: a VFIO mdev may sit behind the mock IOMMU too (mtty.mock_iommu=1) */
static bool mock_is_lab_mdev(struct device *dev)
{
	return dev->bus && !strcmp(dev->bus->name, "mdev");
}

static unsigned long mock_dev_flags(struct device *dev)
{
	if (mock_is_lab_mdev(dev))
		return strncmp(dev_name(dev), "0d0d0d0d", 8) ?
			0 : MOCK_FLAGS_DEVICE_NO_DIRTY;
	return container_of(dev, struct mock_dev, dev)->flags;
}

"""

_MTTY_PARAMETER = """static const struct vfio_device_ops mtty_dev_ops;
static const struct vfio_device_ops mtty_phys_ops;

/* lab: put the devices behind the mock IOMMU of iommufd's selftest */
static bool mock_iommu;
module_param(mock_iommu, bool, 0444);
"""

_MTTY_REGISTER = r"""if (mock_iommu) {
		ret = iommu_probe_device(&mdev->dev);
		if (!ret)
			ret = vfio_register_group_dev(\1);
	} else {
		ret = vfio_register_emulated_iommu_dev(\1);
	}"""

_MTTY_LEAVE_GROUP = "\\1\tif (mock_iommu)\n\t\tiommu_group_remove_device(&mdev->dev);\n"


class TreeDiffers(Exception):
    """This kernel's source is not what the edits were written for."""


class Source:
    """One file of the tree, edited in memory and written back whole."""

    def __init__(self, tree: Path, name: str) -> None:
        self._path = tree / name
        self._text = self._path.read_text()
        self.is_patched = MARK in self._text

    def replace(self, pattern: str, replacement: str, *, times: int = 1) -> None:
        self._text, found = re.subn(pattern, replacement, self._text, flags=re.DOTALL)
        if found != times:
            raise TreeDiffers(f"{self._path}: {found} places, not {times}, match {pattern!r}")

    def matched(self, pattern: str) -> str:
        found = re.search(pattern, self._text, flags=re.DOTALL)
        if found is None:
            raise TreeDiffers(f"{self._path}: nothing matches {pattern!r}")
        return found.group(0)

    def insert_before(self, pattern: str, text: str) -> None:
        self.replace(f"(?={pattern})", text.replace("\\", "\\\\"))

    def insert_after(self, pattern: str, text: str) -> None:
        self.replace(f"({pattern})", r"\1" + text.replace("\\", "\\\\"))

    def write(self) -> None:
        self._path.write_text(self._text)


def patch(tree: Path) -> None:
    """Make all three edits; a file that has its edit already is left alone. Raises TreeDiffers."""
    edits = {
        "drivers/iommu/iommufd/iommufd_test.h": _widen_aperture,
        "drivers/iommu/iommufd/selftest.c": _accept_mdevs,
        "samples/vfio-mdev/mtty.c": _join_mock_iommu,
    }
    sources = {name: Source(tree, name) for name in edits}
    for name, source in sources.items():
        if not source.is_patched:
            edits[name](source)
    for source in sources.values():
        source.write()


def _widen_aperture(source: Source) -> None:
    source.replace(r"(MOCK_APERTURE_START = )[^,]*,", rf"\g<1>0, {MARK} */")
    source.replace(r"(MOCK_APERTURE_LAST = )[^,]*,", r"\g<1>(1UL << 47) - 1,")


def _accept_mdevs(source: Source) -> None:
    source.insert_before(r"static int mock_domain_nop_attach", _DEVICE_FLAGS)
    # Four functions look at a device's flags; each takes its mock_dev for that alone.
    uses = r"(?=(?:(?!\n}\n).)*?\bmdev->flags & MOCK_FLAGS_DEVICE)"
    taking = r"\t+struct mock_dev \*mdev = container_of\(dev, struct mock_dev, dev\);\n(\n?)"
    source.replace(taking + uses, "", times=4)
    source.replace(r"\bmdev->flags & (MOCK_FLAGS_DEVICE_\w+)", r"mock_dev_flags(dev) & \1", times=4)
    source.replace(r"(dev->bus != &iommufd_mock_bus_type\.bus)\)", r"\1 && !mock_is_lab_mdev(dev))")


def _join_mock_iommu(source: Source) -> None:
    source.replace(r"static const struct vfio_device_ops mtty_dev_ops;\n", _MTTY_PARAMETER)
    choose = r"\1mock_iommu ? &mtty_phys_ops : &mtty_dev_ops"
    source.replace(r"(vfio_alloc_device\([^;]*?)&mtty_dev_ops", choose)
    source.replace(r"ret = vfio_register_emulated_iommu_dev\((.*?)\);", _MTTY_REGISTER)
    source.replace(r"(vfio_unregister_group_dev\([^;]*;\n)", _MTTY_LEAVE_GROUP)
    table = r"static const struct vfio_device_ops mtty_dev_ops = \{.*?\n\};\n"
    twin = source.matched(table).replace("mtty_dev_ops", "mtty_phys_ops")
    source.insert_after(table, "\n" + twin.replace("emulated", "physical"))


def main() -> int:
    """Patch the tree that the only argument names."""
    try:
        patch(Path(sys.argv[1]))
    except (TreeDiffers, OSError) as error:
        sys.stderr.write(f"patch_tree: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
