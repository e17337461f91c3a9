"""What all tests share: the QEMUs, the lab guest, and the watch for what a test leaves behind.

Fixtures for tests that need the real thing:

    qemu_binaries     {"7.2": path, "10": path}; both are had, or the test errors
    qemu_binary       one test run with each of the two
    lab_guest         builds a ROM for `-bios` below the test's tmp_path
    promtool          Prometheus' own checker
    etcd_binary       the server of a fleet's arbiter
    short_tmp_path    like tmp_path, but short enough for a unix socket's name

Around every test: no process, socket or task of the test may outlive it, and no call in migrd
may block the event loop. Nothing here skips: what cannot be had fails, with the reason.
"""

from __future__ import annotations

import asyncio
import inspect
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from blockbuster import blockbuster_ctx

from migrd.demo.image import GuestImage
from tests.lab.leaks import processes_naming, sockets_below
from tests.setup import debian

_GRACE_S = 5.0

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell gives that to what it starts in the background, and it is inherited: then no Ctrl-C
    # reaches the processes of the tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.setup.scheduling import OneQemuAtATime  # where there is no xdist there is none

    return OneQemuAtATime(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "qemu_binaries" in getattr(item, "fixturenames", ()):
            item.add_marker("real")


@pytest.fixture(scope="session")
def qemu_binaries() -> dict[str, Path]:
    """The two QEMUs that migrd must work with: the distribution's and the backports'."""
    return debian.qemu_binaries()


@pytest.fixture(params=["7.2", "10"])
def qemu_binary(request: pytest.FixtureRequest, qemu_binaries: dict[str, Path]) -> Path:
    return qemu_binaries[request.param]


@pytest.fixture(scope="session")
def promtool() -> Path:
    return debian.promtool()


@pytest.fixture(scope="session")
def etcd_binary() -> Path:
    return debian.etcd()


@pytest.fixture
def short_tmp_path() -> Iterator[Path]:
    """A directory for unix sockets: their names are limited to 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="migrd-", dir="/tmp"))
    yield path
    left = [*processes_naming(path), *sockets_below(path)]
    shutil.rmtree(path)
    assert not left, f"left behind: {left}"


@pytest.fixture
def lab_guest(tmp_path: Path) -> Callable[..., Path]:
    """Call with the parameters of GuestImage; returns the path of the ROM."""

    def build(**parameters: Any) -> Path:
        image = GuestImage(**parameters)
        return image.write_rom(tmp_path / f"guest-{abs(hash(image)):x}.rom")

    return build


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nothing a test started outlives it: no process, no socket; for async tests, no task."""
    is_async = inspect.iscoroutinefunction(getattr(request.node, "obj", None))
    if is_async:
        request.getfixturevalue("_no_task_left")
        with blockbuster_ctx("migrd"):
            yield
    else:
        yield
    path = request.node.funcargs.get("tmp_path")
    if path is not None:
        left = [*processes_naming(path), *sockets_below(path)]
        assert not left, f"left behind: {left}"


@pytest.fixture
async def _no_task_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    if left:
        await asyncio.wait(left, timeout=_GRACE_S)
    left = {task for task in left if not task.done()}
    assert not left, f"tasks left behind: {left}"
