"""A VMM written from the protocol's page alone (migrd/direct/messages.py), in a thread of the test.

It keeps every rule, and shares no code with the client libraries but the layouts. Its guest is one
thread that counts in the first word of real memory. What it must *not* do like the others is
scripted:

    vmm.before_answer[Pause] = lambda: event.wait()       answers late
    vmm.instead[Pause] = lambda serial: [...]             says this instead of its answer
"""

from __future__ import annotations

import array
import ctypes
import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from migrd.direct.client_link import sealed
from migrd.direct.messages import (
    MOST_PACKET_BYTES,
    Answer,
    Ask,
    AskState,
    ClientState,
    Departed,
    ErrorMessage,
    GiveRegion,
    Hello,
    LoadState,
    Message,
    OfferEnd,
    Pause,
    Quit,
    RangeMessage,
    RegionMessage,
    Resume,
    SaveState,
    SourceKind,
    SourceMessage,
    Status,
    Throttle,
    Welcome,
    decode,
    encode,
)

_BEAT_S = 0.01
_RETRY_S = 0.05
_STATE = struct.Struct("<Q")
_ALLOWED: dict[type[Ask], set[ClientState]] = {
    Pause: {ClientState.RUNNING, ClientState.PAUSED},
    Resume: set(ClientState) - {ClientState.INCOMING},
    SaveState: {ClientState.PAUSED},
    GiveRegion: {ClientState.INCOMING},
    LoadState: {ClientState.INCOMING},
    Departed: {ClientState.PAUSED, ClientState.DEPARTED},
    Throttle: {ClientState.RUNNING, ClientState.PAUSED},
    Quit: set(ClientState),
    AskState: set(ClientState),
}


class ScriptedVmm:
    """`with` connects it, for ever; afterwards nothing of it is left."""

    def __init__(
        self,
        path: Path,
        *,
        instance: str = "",
        is_incoming: bool = False,
        length_bytes: int = 1 << 20,
    ) -> None:
        self.pid = os.getpid()
        self.before_answer: dict[type[Ask], Callable[[], object]] = {}
        self.instead: dict[type[Ask], Callable[[int], Sequence[bytes]]] = {}
        self.errors: list[str] = []
        """What the daemon said before it hung up."""
        self._path, self._instance = path, instance
        self._state = ClientState.INCOMING if is_incoming else ClientState.RUNNING
        self._migration_id = ""
        self._region: tuple[int, int] | None = None
        self._memory: mmap.mmap | None = None
        self._beats: list[int] = []
        self._may_run = threading.Lock()  # held while the guest stands still
        self._has_ended = threading.Event()
        self._plain: socket.socket | None = None
        self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
        self._threads = [threading.Thread(target=run) for run in (self._serve_for_ever, self._run)]
        if is_incoming:
            self._may_run.acquire()
        else:
            self._map(os.memfd_create("guest"), length_bytes)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()
        self.hang_up()
        for thread in self._threads:
            thread.join()
        if self._region is not None:
            os.close(self._region[0])
        os.close(self._pagemap)

    def beats(self) -> list[int]:
        return list(self._beats)

    def has_ended(self) -> bool:
        return self._has_ended.is_set()

    @property
    def state(self) -> ClientState:
        return self._state

    def hang_up(self) -> None:
        """Break the connection; it connects anew."""
        plain = self._plain
        if plain is not None:
            with suppress(OSError):  # over already
                plain.shutdown(socket.SHUT_RDWR)

    def _map(self, fd: int, length_bytes: int) -> None:
        if os.fstat(fd).st_size < length_bytes:
            os.ftruncate(fd, length_bytes)
        self._region = fd, length_bytes
        self._memory = mmap.mmap(fd, length_bytes)

    def _run(self) -> None:
        """The guest."""
        while not self._has_ended.is_set():
            if self._may_run.acquire(timeout=_BEAT_S):
                try:
                    assert self._memory is not None
                    number = _STATE.unpack_from(self._memory)[0] + 1
                    _STATE.pack_into(self._memory, 0, number)
                    self._beats.append(number)
                finally:
                    self._may_run.release()
                time.sleep(_BEAT_S)

    def _serve_for_ever(self) -> None:
        while not self._has_ended.is_set():
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as self._plain:
                try:
                    self._plain.connect(os.fspath(self._path))
                    self._hand_over()
                    while not self._has_ended.is_set():
                        self._serve_one()
                except (OSError, EOFError):
                    pass
            self._has_ended.wait(_RETRY_S)

    def _say(self, message: Message, serial: int = 0, fd: int | None = None) -> None:
        assert self._plain is not None
        fds = array.array("i", [] if fd is None else [fd])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else []
        self._plain.sendmsg([encode(message, serial)], rights)

    def _hear(self) -> tuple[int, Message, int | None]:
        assert self._plain is not None
        packet, fds, _, _ = socket.recv_fds(self._plain, MOST_PACKET_BYTES, 1)
        if not packet:
            raise EOFError
        found = decode(packet)
        if isinstance(found.message, ErrorMessage):
            self.errors.append(found.message.text)
            raise EOFError
        return found.serial, found.message, fds[0] if fds else None

    def _hand_over(self) -> None:
        self._has_offered = False
        self._say(Hello(self._state, 1, "guest", self._instance, self._migration_id))
        if self._state is not ClientState.INCOMING:
            self._offer()
        assert isinstance(self._hear()[1], Welcome)

    def _offer(self) -> None:
        assert self._region is not None
        fd, length_bytes = self._region
        assert self._memory is not None
        hva = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._say(RegionMessage(0, 0, length_bytes, 0, hva), fd=fd)
        watched = (RangeMessage(0, 0, hva, length_bytes),)
        self._say(SourceMessage(SourceKind.PROCESS, 0, 4096, watched), fd=self._pagemap)
        self._say(OfferEnd(1, 1, 0))
        self._has_offered = True

    def _serve_one(self) -> None:
        serial, ask, fd = self._hear()
        assert isinstance(ask, Ask)
        kind = type(ask)
        self.before_answer.get(kind, lambda: None)()
        if kind in self.instead:
            assert self._plain is not None
            for packet in self.instead[kind](serial):
                self._plain.send(packet)
            return
        answer, state_fd = self._answer(ask, fd)
        self._say(answer, serial, state_fd)
        if state_fd is not None:
            os.close(state_fd)
        if isinstance(ask, Quit):
            self._has_ended.set()
        if self._state is ClientState.RUNNING and not self._has_offered:
            self._offer()
            assert isinstance(self._hear()[1], Welcome)

    def _answer(self, ask: Ask, fd: int | None) -> tuple[Answer, int | None]:
        if self._state not in _ALLOWED[type(ask)] or not self._is_sensible(ask):
            if fd is not None:
                os.close(fd)
            text = f"not in state {self._state.name.lower()}"
            return Answer(Status.REFUSED, self._state, 0, self._migration_id, text), None
        state_fd, value = None, 0
        if isinstance(ask, SaveState):
            state_fd, value = sealed(_STATE.pack(len(self._beats))), _STATE.size
        elif isinstance(ask, GiveRegion) and fd is not None:
            self._map(fd, ask.length_bytes)
        elif isinstance(ask, LoadState) and fd is not None:
            os.close(fd)
            self._state = ClientState.LOADED
        self._move(ask)
        return Answer(Status.DONE, self._state, value, self._migration_id), state_fd

    def _is_sensible(self, ask: Ask) -> bool:
        if isinstance(ask, LoadState):
            return self._memory is not None
        if isinstance(ask, Departed) and self._state is ClientState.DEPARTED:
            return ask.migration_id == self._migration_id
        return not (isinstance(ask, GiveRegion) and self._memory is not None)

    def _move(self, ask: Ask) -> None:
        if isinstance(ask, Pause) and self._state is ClientState.RUNNING:
            self._may_run.acquire()
            self._state = ClientState.PAUSED
        elif isinstance(ask, Resume) and self._state is not ClientState.RUNNING:
            self._state, self._migration_id = ClientState.RUNNING, ""
            self._may_run.release()
        elif isinstance(ask, Departed):
            self._state, self._migration_id = ClientState.DEPARTED, ask.migration_id
