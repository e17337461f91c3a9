"""What both sides still say of a transfer that has failed, or whose source has died."""

import asyncio
import contextlib
from typing import Final

from migrd.core.facts import TransferSample
from migrd.core.handover import DestinationPhase
from migrd.engine.outgoing import Outgoing
from migrd.engine.ports import DestinationView
from migrd.errors import PeerError, VmmError

LAST_WORD_S: Final = 5.0
REASON_S: Final = 0.5
"""So long the destination may take to say why it failed; the guest runs meanwhile."""


async def last_word(m: Outgoing) -> DestinationView | None:
    """The destination's view once it has settled on loaded or refused; None: it did not say."""
    try:
        async with asyncio.timeout(LAST_WORD_S):
            generation = -1
            while True:
                view = await m.peer.view(m.id, newer_than=generation, wait_s=1.0)
                if view.phase not in (DestinationPhase.PREPARING, DestinationPhase.RECEIVING):
                    return view
                generation = view.generation
    except (TimeoutError, PeerError):
        return None


async def why_failed(m: Outgoing, sample: TransferSample) -> str:
    """What both sides say about a failed transfer: the event of it comes without a reason."""
    ours = sample.error
    if ours is None:
        with contextlib.suppress(VmmError):
            ours = (await m.vmm.sample()).error
    text = f"on {m.world.options.host}: {ours or 'no reason was given'}"
    with contextlib.suppress(PeerError, TimeoutError):
        async with asyncio.timeout(REASON_S):
            view = await m.peer.view(m.id)
            while view.phase not in (DestinationPhase.REFUSED, DestinationPhase.LOADED):
                view = await m.peer.view(m.id, newer_than=view.generation, wait_s=REASON_S)
            if view.phase is DestinationPhase.REFUSED and view.reason:
                text += f"; on {m.peer.name}: {view.reason}"
    return text
