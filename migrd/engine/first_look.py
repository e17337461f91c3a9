"""The first look at a QEMU after a restart: its monitor is only being connected.

No answer yet says nothing about the migration: it goes on by itself meanwhile, so there is time.
"""

import asyncio
import contextlib
from dataclasses import replace
from typing import Final

from migrd.core.facts import TransferSample
from migrd.engine.ports import Vmm
from migrd.errors import VmmTimedOut, VmmUnreachable

PATIENCE_S: Final = 10.0
LOOK_S: Final = 0.05


async def first_look(vmm: Vmm) -> TransferSample:
    """Its sample, as soon as it answers. Raises the VmmError family after PATIENCE_S."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE_S):
            while True:
                with contextlib.suppress(VmmUnreachable, VmmTimedOut):
                    return await vmm.sample()
                await asyncio.sleep(LOOK_S)
    return await vmm.sample()


def keep_numbers(before: TransferSample | None, sample: TransferSample) -> TransferSample:
    """QEMU's numbers vanish at the end: the last ones are kept, the statuses are new."""
    if before is None:
        return sample
    return replace(
        before, at_s=sample.at_s, qemu_status=sample.qemu_status, run_state=sample.run_state
    )
