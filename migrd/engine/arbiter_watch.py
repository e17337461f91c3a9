"""While a guest is copied: does the arbiter answer, and is the record this host's?

Nobody could start the guest over there without it, so QEMU is held in precopy meanwhile: the guest
runs, and is not stopped for nothing. A restarted daemon claims anew here (which writes nothing when
the record is as it should be): the revision is durable only with the grant.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from migrd.core.migration import Cause
from migrd.engine.arbitrated import own_record
from migrd.engine.outgoing import Outgoing
from migrd.engine.ownership import UNREACHABLE, present
from migrd.errors import ArbiterUnavailable, Conflict

LOOK_S: Final = 0.25


class ArbiterWatch:
    """Of one run of the precopy step."""

    def __init__(self, m: Outgoing) -> None:
        self._m = m
        self.lost: Cause | None = None
        """The record is another host's: this migration cannot go on."""

    async def run(
        self,
        hold: Callable[[str, str], Awaitable[None]],
        let_go: Callable[[str], Awaitable[None]],
    ) -> None:
        """Until cancelled. `hold(condition, why)` while it does not answer, then `let_go`."""
        if not self._m.state.arbitrated:
            return
        while self.lost is None:
            try:
                await self._look()
            except ArbiterUnavailable as exc:
                await hold(UNREACHABLE, exc.message)
            except Conflict as exc:
                self.lost = Cause(exc.code, exc.message)
            else:
                await let_go(UNREACHABLE)
            await asyncio.sleep(LOOK_S)

    async def _look(self) -> None:
        """Without I/O while all is well."""
        await own_record(self._m)
        if not present(self._m.world).state.is_reachable:
            await present(self._m.world).read(self._m.stored.request.vm)
        self._m.settle(UNREACHABLE)
