"""`find` while instances of other VMs are being removed."""

import threading
from pathlib import Path

from migrd.qemu.launch import QemuLauncher
from migrd.qemu.profile_files import Profiles

TIMES = 300


async def test_an_instance_that_goes_away_while_find_looks_is_no_error(
    short_tmp_path: Path,
) -> None:
    launcher = QemuLauncher(Profiles(directory=short_tmp_path / "profiles"), short_tmp_path)
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            for vm in ("one", "two", "three"):
                directory = short_tmp_path / "vms" / vm / "not an instance"
                directory.mkdir(parents=True)
                directory.rmdir()
                directory.parent.rmdir()

    others = threading.Thread(target=come_and_go)
    others.start()
    try:
        for _ in range(TIMES):
            assert list(await launcher.find()) == []
    finally:
        stop.set()
        others.join()
        await launcher.close()
