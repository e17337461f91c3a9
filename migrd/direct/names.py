"""Whose a VM's name is: the living process's that claimed it, connected or not.

    claim by another process, and the holder is     dead                    the name is the other's
                                                    alive and departed      so too: the guest left
                                                    alive in any other way  refused

A departed process keeps speaking to migrd (it may have to take its guest back), it just does not
hold the name: the same guest may come back to this host into a new process meanwhile. For the same
reason a departed process claims nothing when it connects anew.
"""

import os
from dataclasses import dataclass
from typing import Final

from migrd.direct.handoff import HandedOver
from migrd.direct.messages import ClientState
from migrd.direct.peer_process import PeerProcess
from migrd.errors import Conflict, TooLarge

_MOST_NAMES: Final = 4096


@dataclass
class _Holder:
    process: PeerProcess
    """With a pidfd of its own: it is needed when the connection is long gone."""
    client: HandedOver | None = None


class NameHolders:
    """Owns a pidfd for each name."""

    def __init__(self) -> None:
        self._holders: dict[str, _Holder] = {}

    def claim(self, vm: str, process: PeerProcess, state: ClientState) -> None:
        """Raises Conflict: another living process has the name; TooLarge."""
        holder = self._holders.get(vm)
        if holder is not None and holder.process.is_same(process):
            return
        if state is ClientState.DEPARTED:
            return
        if holder is not None and not self._is_free(holder):
            raise Conflict(
                f"vm: {vm} is the guest of process {holder.process.pid}, which is alive; end that "
                "process first, or hand over under another name",
                code="name_taken",
            )
        if holder is not None:
            self._drop(vm)
        if len(self._holders) >= _MOST_NAMES:
            self._drop_the_dead()
        if len(self._holders) >= _MOST_NAMES:
            raise TooLarge(f"vm: {_MOST_NAMES} names are held by living processes; end some")
        own = PeerProcess(process.pid, process.uid, os.dup(process.pidfd))
        self._holders[vm] = _Holder(own)

    def note(self, client: HandedOver) -> None:
        """This is the connection that says where the holder's guest stands."""
        holder = self._holders.get(client.vm)
        if holder is not None and holder.process.pid == client.pid:
            holder.client = client

    def close(self) -> None:
        for vm in list(self._holders):
            self._drop(vm)

    def _is_free(self, holder: _Holder) -> bool:
        has_left = holder.client is not None and holder.client.state is ClientState.DEPARTED
        return has_left or holder.process.is_dead

    def _drop_the_dead(self) -> None:
        for vm, holder in list(self._holders.items()):
            if holder.process.is_dead:
                self._drop(vm)

    def _drop(self, vm: str) -> None:
        self._holders.pop(vm).process.close()
