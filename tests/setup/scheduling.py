"""Which tests run beside which, with pytest-xdist."""

from typing import Final

from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]  # xdist's own
from xdist.workermanage import WorkerController  # type: ignore[import-untyped]  # and this

_DIRECTORIES = ("bench", "contract", "daemon", "demo", "integration", "qemu")
ONE_AT_A_TIME: Final = (
    *(f"tests/{name}/" for name in _DIRECTORIES),
    "tests/arbiter/test_partition.py",
)
"""Where tests with a QEMU are."""
DIRECT: Final = "tests/integration/test_direct"
LAB: Final = "tests/lab/"


class OneQemuAtATime(LoadScopeScheduling):  # type: ignore[misc]  # xdist's is untyped
    """Tests with a QEMU run one after the other, on one worker, whatever the other one does.

    Two pairs of QEMUs at once would leave none of them the processor time that they, and the
    limits in the tests, count on. Guests of the direct engine, which cost far less, are moved by
    the other worker, one after the other too. The lab is one guest after the other, each booted
    once for all tests in it, and is the other worker's last: as much beside the rest as what went
    before it, and its kernel has had the time to be built. (xdist's own groups do nothing with
    pytest 9: they write their mark where node ids are no longer read.)
    """

    def _split_scope(self, nodeid: str) -> str:
        for apart in (LAB, DIRECT):
            if nodeid.startswith(apart):
                return apart
        return "qemu" if nodeid.startswith(ONE_AT_A_TIME) else nodeid

    def _assign_work_unit(self, node: WorkerController) -> None:
        if LAB in self.workqueue:
            self.workqueue.move_to_end(LAB)
        super()._assign_work_unit(node)
