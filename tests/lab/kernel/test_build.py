"""Building the lab's kernel, but for the building: that is done before the tests that boot it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.kernel import build, patch_tree
from tests.setup.debian import SetUpError

MTTY = """
static const struct vfio_device_ops mtty_dev_ops;
	mdev_state = vfio_alloc_device(mdev_state, vdev, &mdev->dev, &mtty_dev_ops);
	ret = vfio_register_emulated_iommu_dev(&mdev_state->vdev);
	vfio_unregister_group_dev(&mdev_state->vdev);
static const struct vfio_device_ops mtty_dev_ops = {
	.bind_iommufd	= vfio_iommufd_emulated_bind,
};
"""
SELFTEST = (
    "static int mock_domain_nop_attach\n"
    + """{
	struct mock_dev *mdev = container_of(dev, struct mock_dev, dev);

	if (mdev->flags & MOCK_FLAGS_DEVICE_NO_DIRTY)
		return -EINVAL;
}
"""
    * 4
    + "if (dev->bus != &iommufd_mock_bus_type.bus)\n"
)
HEADER = "MOCK_APERTURE_START = 1UL << 24,\nMOCK_APERTURE_LAST = (1UL << 31) - 1,\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """As much of a kernel as the patch looks at."""
    for name, text in (
        ("drivers/iommu/iommufd/iommufd_test.h", HEADER),
        ("drivers/iommu/iommufd/selftest.c", SELFTEST),
        ("samples/vfio-mdev/mtty.c", MTTY),
    ):
        path = tmp_path / "linux" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "linux"


def texts(tree: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in tree.rglob("*.[ch]")}


def test_patching_twice_is_patching_once(tree: Path) -> None:
    patch_tree.patch(tree)
    once = texts(tree)
    assert all(patch_tree.MARK in text for text in once.values())
    patch_tree.patch(tree)
    assert texts(tree) == once


def test_a_kernel_that_looks_different_is_refused_by_name_and_left_as_it_is(tree: Path) -> None:
    mtty = tree / "samples/vfio-mdev/mtty.c"
    mtty.write_text(MTTY.replace("vfio_register_emulated_iommu_dev", "vfio_register_mdev"))
    before = texts(tree)
    done = subprocess.run(
        [sys.executable, build.PATCH, tree], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "mtty.c: 0 places, not 1" in done.stderr
    assert texts(tree) == before


def test_lines_that_the_configuration_did_not_take_are_named() -> None:
    fragment = "# words\nCONFIG_A=y\nCONFIG_B=y\n# CONFIG_C is not set\n# CONFIG_D is not set\n"
    config = "CONFIG_A=y\nCONFIG_B=m\nCONFIG_C=y\n# CONFIG_D is not set\n"
    assert build.lost_lines(fragment, config) == ["CONFIG_B=y", "# CONFIG_C is not set"]


def test_the_recipe_is_the_same_until_the_configuration_or_the_patch_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipes = {build.recipe(), build.recipe()}
    for name in ("FRAGMENT", "PATCH"):
        changed = tmp_path / name
        changed.write_bytes(getattr(build, name).read_bytes() + b"#\n")
        with monkeypatch.context() as patch:
            patch.setattr(build, name, changed)
            recipes.add(build.recipe())
    assert len(recipes) == 3


def test_a_missing_compiler_is_named_as_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SetUpError, match="flex bison bc make gcc xz-utils"):
        build.recipe()


class Machine:
    """One whose make and Debian are made up; what make does is set by the test."""

    def __init__(self, cache: Path) -> None:
        self.home = cache / "migrd" / "lab-kernel"
        self.steps: list[str] = []
        self.make = "mkdir -p $objects/arch/x86/boot; echo image >$objects/arch/x86/boot/bzImage"

    def unpack(self, work: Path) -> str:
        (work / "source" / "linux").mkdir(parents=True)
        return "6.12.1-1"

    def configure(self, tree: Path, objects: Path) -> None:
        objects.mkdir()
        (objects / ".config").write_text("")

    def command(self, tree: Path, objects: Path, *targets: str) -> Sequence[str]:
        return ["sh", "-c", f"objects={objects}; {self.make}"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    made_up = Machine(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "PATCH", Path(os.devnull))  # python runs it, and does nothing
    monkeypatch.setattr(build._Build, "_unpack", made_up.unpack)
    monkeypatch.setattr(build._Build, "_configure", made_up.configure)
    monkeypatch.setattr(build, "_make", made_up.command)
    return made_up


def left(machine: Machine) -> set[str]:
    return {path.name for path in machine.home.iterdir()} - {".lock"}


def test_an_image_is_built_once_and_its_source_removed(machine: Machine) -> None:
    machine.home.mkdir(parents=True)
    (machine.home / ".build-of-one-that-was-killed").mkdir()
    image = build.kernel_image()
    assert image.read_text() == "image\n"
    assert left(machine) == {f"{build.recipe()}-6.12.1-1"}
    machine.make = "exit 1"
    assert build.kernel_image() == image


def test_a_build_that_fails_says_why_and_leaves_only_its_log(machine: Machine) -> None:
    machine.make = "echo gelf.h: no such file; exit 2"
    with pytest.raises(SetUpError, match=r"build.log ends with:\ngelf.h: no such file"):
        build.kernel_image()
    assert left(machine) == {"build.log"}


def test_a_build_that_takes_too_long_is_ended_with_all_it_started(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.make = f"sleep 600 & echo $! >{machine.home}/pid; wait"
    monkeypatch.setattr(build, "LIMIT_S", 2)
    with pytest.raises(SetUpError, match="not built within"):
        build.kernel_image()
    pid = int((machine.home / "pid").read_text())
    deadline_s = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline_s, "make's child lives on"
        time.sleep(0.05)


def test_who_finds_another_building_waits_and_takes_its_image(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = build._only_one

    @contextmanager
    def after_another(path: Path, deadline_s: float) -> Iterator[None]:
        with real(path, deadline_s):
            monkeypatch.setattr(build, "_only_one", real)
            build._Build(machine.home, deadline_s).run()
            machine.make = "exit 1"
            yield

    monkeypatch.setattr(build, "_only_one", after_another)
    assert build.kernel_image().exists()
