"""VFIO devices for a QEMU on a machine whose kernel has none: see `fakevfio.c` for what they do.

    build()           the shared object to preload; compiled once, and again when its source changes
    open_device()     a descriptor to pass as `-device vfio-pci,fd=`
    open_iommufd()    ... as `-object iommufd,fd=`
    environment(...)  for a launch profile: the preload, and what the devices are to do

A compiler and the kernel's headers must be there: without them this raises SetUpError.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from migrd.demo.image import cache_dir
from tests.setup.debian import SetUpError, linux_headers

SOURCE: Final = Path(__file__).parent / "fakevfio.c"
CONFIG_SPACE: Final = bytes.fromhex("f41a0510 00000000 00000002 00000000")
"""Of a network card (class 0x02) that no driver knows; the rest is zeros: no capabilities."""
BAR_END: Final = 0x110000


def build() -> Path:
    """Path of the shared object. Blocking. Raises SetUpError."""
    compiler = shutil.which("gcc")
    if compiler is None:
        raise SetUpError("gcc is missing: the VFIO stand-in for QEMU is compiled; install gcc")
    headers = linux_headers()
    key = hashlib.sha256(SOURCE.read_bytes() + os.fspath(headers).encode()).hexdigest()[:12]
    built = cache_dir() / "vfio-shim" / f"fakevfio-{key}.so"
    if built.exists():
        return built
    built.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=built.parent) as aside:
        target = Path(aside) / built.name
        flags = ["-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-isystem", os.fspath(headers)]
        command = [compiler, *flags, "-o", os.fspath(target), os.fspath(SOURCE), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode != 0:
            raise SetUpError(f"{SOURCE} cannot be compiled:\n{done.stderr}")
        target.replace(built)
    return built


def open_device() -> int:
    """The caller's to close."""
    fd = os.memfd_create("fake-vfio-device", os.MFD_CLOEXEC)
    os.ftruncate(fd, BAR_END)
    os.pwrite(fd, CONFIG_SPACE, 0)
    return fd


def open_iommufd() -> int:
    """The caller's to close."""
    return os.memfd_create("fake-iommufd", os.MFD_CLOEXEC)


def environment(shim: Path, **knobs: str | int) -> Mapping[str, str]:
    """`knobs` without their FV_: see fakevfio.c."""
    asked = {f"FV_{name.upper()}": str(value) for name, value in knobs.items()}
    return {"LD_PRELOAD": os.fspath(shim), **asked}
