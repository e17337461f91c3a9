"""A postcopy whose source has died behind a link that says nothing: when has all come that will?

The destination's QEMU learns of the source's death by its connection. Where the link swallows that
too, it would wait for ever, still `postcopy-active`, with a guest that stands still at its first
missing page. migrd on the source knows the death by proof. What that QEMU had sent may be on its
way all the same: the kernel of its host delivers it after the death, and gives up after its
retransmissions (`tcp_retries2`, 924.6 s by default: Linux, ip-sysctl). After that nothing comes any
more, and the connection is closed here, which shows what is missing.
"""

import asyncio
from typing import Final

from migrd.engine.incoming_record import IncomingRecord
from migrd.errors import PeerError

NOTHING_MORE_S: Final = 1000.0
"""After the proof of death."""
ASK_EACH_S: Final = 10.0
ANSWER_S: Final = 2.0


class Orphan:
    """Of one incoming migration, while its memory is awaited."""

    def __init__(self, incoming: IncomingRecord) -> None:
        self._incoming = incoming
        self._clock = incoming.world.clock
        self._asked_s = self._clock.monotonic_s()
        self._died_s: float | None = None

    async def is_left_alone(self) -> bool:
        """The source's QEMU is proven dead for so long that nothing of it can arrive any more."""
        now_s = self._clock.monotonic_s()
        if self._died_s is None and now_s - self._asked_s >= ASK_EACH_S:
            self._asked_s = now_s
            if await is_copy_gone(self._incoming):
                self._died_s = now_s
        return self._died_s is not None and now_s - self._died_s >= NOTHING_MORE_S


async def is_copy_gone(incoming: IncomingRecord) -> bool:
    """Does migrd on the source say that its QEMU is proven dead? Silence is no yes."""
    if incoming.source is None:
        return False
    try:
        async with asyncio.timeout(ANSWER_S):
            view = await incoming.source.source_view(incoming.id)
    except (PeerError, TimeoutError):
        return False
    return view.copy_gone
