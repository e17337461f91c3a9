"""One source's attempt, as the destination keeps it: its channels, its memory, its rounds.

    opening of a channel ── join ──► in the session ── leave ──► the last one gives the memory up

Several threads use it, one per channel; every method takes the lock. The barrier is enforced here:
a channel that begins round n while another has not ended round n-1 is refused, and so is a round
that carries more than the whole memory once. So a source that sends for ever stays within its own
memory, and the migration's deadline, which closes the Receiver, ends it.
"""

import threading

from migrd.core.memory_map import PAGE_BYTES
from migrd.direct.channel import Channel
from migrd.direct.manifest import Manifest
from migrd.direct.rebuilt_memory import RebuiltMemory
from migrd.direct.stream_limits import StreamLimits
from migrd.direct.stream_wire import Opening, Tally
from migrd.errors import MigrdError, ReceiveError


class Session:
    def __init__(self, opening: Opening) -> None:
        self.id = opening.session
        self.channel_count = opening.channels
        self.is_loaded = False
        self.memory: RebuiltMemory | None = None
        self.manifest: Manifest | None = None
        self._lock = threading.Lock()
        self._channels: dict[int, Channel] = {}
        self._rounds = dict.fromkeys(range(opening.channels), 1)
        self._tallies = dict.fromkeys(range(opening.channels), Tally())
        self._counted_round, self._counted_pages = 1, 0
        self._failure: MigrdError | None = None

    # ---------------------------------------------------------------- channels

    def join(self, opening: Opening, channel: Channel) -> None:
        """Raises ReceiveError: there is no such place, or somebody has it."""
        with self._lock:
            if opening.channels != self.channel_count:
                raise ReceiveError(
                    f"channel {opening.channel} says there are {opening.channels} channels, the"
                    f" first one said {self.channel_count}"
                )
            if opening.channel in self._channels:
                raise ReceiveError(f"channel {opening.channel} is connected already")
            if self._failure is not None:
                raise self._failure
            self._channels[opening.channel] = channel

    def leave(self, number: int) -> bool:
        """True for the last one."""
        with self._lock:
            del self._channels[number]
            return not self._channels

    def fail(self, why: MigrdError) -> None:
        """End all channels; the first reason counts."""
        with self._lock:
            if self._failure is not None:
                return
            self._failure = why
            for channel in self._channels.values():
                channel.interrupt(self._failure)

    def check(self) -> None:
        """Raises what the session has failed of."""
        if self._failure is not None:
            raise self._failure

    # ---------------------------------------------------------------- memory

    def take_memory(self, manifest: Manifest, limits: StreamLimits) -> RebuiltMemory:
        """Raises ReceiveError: too much, no room, or a second manifest. Blocking: reserves."""
        wanted = manifest.memory.bytes
        if wanted > limits.memory_bytes:
            raise ReceiveError(
                f"the guest has {wanted >> 20} MiB of memory, this VM may have"
                f" {limits.memory_bytes >> 20} MiB here",
                code="memory_too_large",
            )
        if self.manifest is not None:
            raise ReceiveError("a second manifest in one session")
        self.manifest = manifest
        self.memory = RebuiltMemory(manifest.memory, is_reserved=limits.reserve)
        if limits.reserve:
            self.memory.reserve(self.check)
        return self.memory

    def give_up(self) -> None:
        """Close the memory, when no channel uses it any more."""
        if self.memory is not None:
            self.memory.close()

    # ---------------------------------------------------------------- rounds

    def count(self, channel: int, pages: int) -> None:
        """Pages that a channel brings, before they are written. Raises ReceiveError."""
        with self._lock:
            number = self._check_barrier(channel)
            if self._counted_round != number:
                self._counted_round, self._counted_pages = number, 0
            self._counted_pages += pages
            most = self.memory.memory.bytes // PAGE_BYTES if self.memory is not None else 0
            if self._counted_pages > most:
                raise ReceiveError(
                    f"round {number} carries more than all {most} pages of the guest",
                    code="round_too_large",
                )

    def end_round(self, channel: int, number: int, tally: Tally) -> None:
        """Raises ReceiveError: out of order."""
        with self._lock:
            expected = self._check_barrier(channel)
            if number != expected:
                raise ReceiveError(f"round {number} ends where round {expected} was under way")
            self._rounds[channel] = number + 1
            self._tallies[channel] = tally

    def check_totals(self, rounds: int, channels: tuple[Tally, ...], chain_of_first: int) -> None:
        """At FINISH. Raises ReceiveError where both sides do not count the same."""
        with self._lock:
            if set(self._rounds.values()) != {rounds + 1}:
                raise ReceiveError(
                    f"the source finishes after {rounds} rounds; here the channels have ended"
                    f" {sorted(n - 1 for n in self._rounds.values())}"
                )
            first = self._tallies[0]
            ours = [Tally(first.data_pages, first.zero_pages, chain_of_first)]
            ours += [self._tallies[number] for number in range(1, self.channel_count)]
        if list(channels) != ours:
            raise ReceiveError(
                f"the totals differ: the source sent {list(channels)}, here arrived {ours}",
                code="count_mismatch",
            )

    def _check_barrier(self, channel: int) -> int:
        number = self._rounds[channel]
        slowest = min(self._rounds, key=self._rounds.__getitem__)
        if self._rounds[slowest] < number:
            raise ReceiveError(
                f"channel {channel} goes on with round {number} before channel {slowest} has ended"
                f" round {self._rounds[slowest]}"
            )
        return number
