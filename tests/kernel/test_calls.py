"""How every ioctl is made, and how an errno becomes an error."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import Any

import pytest

from migrd.abi.iommufd import iommu_destroy
from migrd.errors import KernelDenied, KernelError, KernelGone, KernelRejected, KernelTooOld
from migrd.kernel.calls import Argument, Meaning, Verb, call, system_ioctl

VERB = Verb("A_VERB", 0x1234, {errno.EINVAL: Meaning(KernelDenied, "its_own", "do that")})


def failing(number: int) -> Any:
    def ioctl(fd: int, request: int, argument: Argument, /) -> int:
        raise OSError(number, os.strerror(number))

    return ioctl


def test_a_calls_own_table_goes_before_the_common_one() -> None:
    with pytest.raises(KernelDenied, match=r"object 7: do that \(A_VERB: EINVAL") as it:
        call(failing(errno.EINVAL), 3, VERB, 0, "free object 7")
    assert it.value.code == "its_own"
    assert it.value.errno == errno.EINVAL
    assert isinstance(it.value.__cause__, OSError)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOTTY, KernelTooOld),
        (errno.ENOENT, KernelGone),
        (errno.EPERM, KernelDenied),
        (errno.EFAULT, KernelRejected),
        (errno.EBADF, KernelGone),
    ],
)
def test_what_a_table_lacks_has_its_common_meaning(number: int, kind: type[KernelError]) -> None:
    with pytest.raises(kind):
        call(failing(number), 3, VERB, 0, "free object 7")


@pytest.mark.parametrize("number", [errno.EXDEV, 4711])
def test_an_errno_that_nobody_has_met_is_an_error_with_its_number(number: int) -> None:
    with pytest.raises(KernelError) as caught:
        call(failing(number), 3, VERB, 0, "free object 7")
    assert type(caught.value) is KernelError
    assert caught.value.errno == number
    assert "cannot free object 7" in caught.value.message


def test_an_interrupted_call_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def ioctl(*_: object) -> int:
        calls.append(1)
        if len(calls) < 3:
            raise InterruptedError(errno.EINTR, "a signal")
        return 5

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    assert system_ioctl(0, 1, iommu_destroy(id=1)) == 5


def test_an_argument_that_would_stop_the_event_loop_is_refused() -> None:
    with pytest.raises(ValueError, match="1025 bytes"):
        system_ioctl(0, 1, bytearray(1025))


@pytest.mark.parametrize("argument", [0, bytearray(8), iommu_destroy(id=1)])
def test_every_kind_of_argument_reaches_the_kernel(argument: Argument) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        with pytest.raises(KernelTooOld):
            call(system_ioctl, fd, VERB, argument, "do it")
    finally:
        os.close(fd)
