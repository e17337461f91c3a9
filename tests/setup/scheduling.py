"""Which tests run beside which, with pytest-xdist."""

from typing import Final

from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]  # xdist's own

_DIRECTORIES = ("bench", "contract", "daemon", "demo", "integration", "lab", "qemu")
ONE_AT_A_TIME: Final = (
    *(f"tests/{name}/" for name in _DIRECTORIES),
    "tests/arbiter/test_partition.py",
)
"""Where tests with a QEMU are."""


class OneQemuAtATime(LoadScopeScheduling):  # type: ignore[misc]  # xdist's is untyped
    """Tests with a QEMU run one after the other, on one worker, whatever the other one does.

    Two pairs of QEMUs at once would leave none of them the processor time that they, and the
    limits in the tests, count on; and guests of the lab would be booted twice. (xdist's own groups
    do nothing with pytest 9: they write their mark where node ids are no longer read.)
    """

    def _split_scope(self, nodeid: str) -> str:
        return "qemu" if nodeid.startswith(ONE_AT_A_TIME) else nodeid
