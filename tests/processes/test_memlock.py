"""How much memory a QEMU with devices may lock."""

import resource
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from migrd.processes import memlock

SHOW = "import resource; print(*resource.getrlimit(resource.RLIMIT_MEMLOCK))"
LITTLE = 64 * 1024


@pytest.fixture
def limits() -> Iterator[tuple[int, int]]:
    """A low soft limit below a hard one that is higher."""
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (LITTLE, before[1]))
    yield LITTLE, before[1]
    resource.setrlimit(resource.RLIMIT_MEMLOCK, before)


def child_limit() -> int:
    shown = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True)
    return int(shown.stdout.split()[0])


def test_only_the_child_of_the_block_may_lock_more(limits: tuple[int, int]) -> None:
    with memlock.inherited(4 * LITTLE):
        assert child_limit() == 4 * LITTLE
    assert child_limit() == LITTLE
    assert resource.getrlimit(resource.RLIMIT_MEMLOCK) == limits


def test_a_limit_is_never_lowered(limits: tuple[int, int]) -> None:
    with memlock.inherited(1024):
        assert child_limit() == LITTLE
    with memlock.inherited(0):
        assert child_limit() == LITTLE


def test_a_start_beside_it_does_not_get_what_it_was_not_meant_to(
    limits: tuple[int, int],
) -> None:
    seen: list[int] = []

    def start_another() -> None:
        with memlock.inherited(0):
            seen.append(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])

    with memlock.inherited(4 * LITTLE):
        another = threading.Thread(target=start_another)
        another.start()
        another.join(0.1)
        assert seen == []
    another.join(10)
    assert seen == [LITTLE]


def test_what_may_not_be_had_is_had_as_far_as_may_be(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[int, int]] = []

    def without_privilege(pid: int, kind: int, wanted: tuple[int, int]) -> None:
        if wanted[1] > 8 * LITTLE:
            raise PermissionError
        asked.append(wanted)

    monkeypatch.setattr(resource, "getrlimit", lambda _: (LITTLE, 8 * LITTLE))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(resource, "prlimit", without_privilege)
    with caplog.at_level("INFO"), memlock.inherited(1 << 40):
        assert asked == [(8 * LITTLE, 8 * LITTLE)]
    assert "LimitMEMLOCK=infinity" in caplog.text


def test_each_iommufd_object_pins_all_memory_once_more() -> None:
    one, two = memlock.needed_bytes(1 << 30, 1), memlock.needed_bytes(1 << 30, 2)
    assert two - one == 1 << 30
    assert memlock.needed_bytes(1 << 30, 0) == one
