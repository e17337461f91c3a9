"""What /metrics serves: bytes that are ready.

    engine's hooks ---> counters                     service ---> views (frozen)
                           |                                        |
                           +------ on the loop: take references ----+
                                              |
                                worker thread: render everything
                                              |
                                      self.latest = Snapshot          <--- a scrape: one attribute

Rules
1. A scrape takes the last snapshot by reference. It waits for no lock, no QEMU and no rendering.
2. Rendering runs at most once in MIN_INTERVAL_S, and only when something changed. What changes all
   the time (process metrics, loop lag) is no such change; it is at most IDLE_INTERVAL_S old.
3. While nobody has scraped for SCRAPED_WITHIN_S, IDLE_INTERVAL_S is enough: rendering costs more
   CPU than watching the VMs does.
4. The worker compresses too, once for all who scrape: handing half a megabyte to a socket is what
   costs the event loop most in a scrape, and Prometheus always accepts gzip.
"""

import asyncio
import hashlib
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from migrd.core.devices import Inventory
from migrd.engine.service import Check, MigrationView, VmView
from migrd.engine.threads import in_thread
from migrd.metrics.devices import device_families
from migrd.metrics.migrations import migration_families
from migrd.metrics.readiness import readiness_families
from migrd.metrics.recorder import Metrics
from migrd.metrics.render import Renderer, Rows
from migrd.metrics.sampling import Sampled, sampling_families
from migrd.metrics.vms import tracked_vms, vm_families

MIN_INTERVAL_S: Final = 1.0
IDLE_INTERVAL_S: Final = 10.0
SCRAPED_WITHIN_S: Final = 120.0
_FASTEST: Final = 1
_GZIP_WRAPPER: Final = 16 + zlib.MAX_WBITS
"""So zlib is told to write gzip's header, without a time in it (zlib.h, deflateInit2)."""


@dataclass(frozen=True)
class Snapshot:
    """One complete exposition."""

    body: bytes
    etag: str
    """Quoted, as the header wants it."""
    at_s: float
    """time.monotonic() when the views were taken."""
    content_type: str = CONTENT_TYPE_PLAIN_0_0_4
    gzipped: bytes = b""
    """`body`, compressed."""


class Views(Protocol):
    """What is read of the engine's Service; each call returns what is ready."""

    def vms(self) -> tuple[int, Sequence[VmView]]: ...

    def migrations(self) -> tuple[int, Sequence[MigrationView]]: ...

    def readiness(self) -> Sequence[Check]: ...


@dataclass(frozen=True)
class _Frozen:
    """Everything one rendering needs, so that the worker shares nothing that changes."""

    vms: Sequence[VmView]
    migrations: Sequence[MigrationView]
    checks: Sequence[Check]
    transferred: Rows
    dirty_pages: Rows
    sampled: Sampled
    inventory: Inventory | None
    at_s: float


class Exposition:
    """Keeps the newest snapshot. `run` belongs to the daemon's task group."""

    def __init__(
        self,
        metrics: Metrics,
        views: Views,
        *,
        min_interval_s: float = MIN_INTERVAL_S,
        idle_interval_s: float = IDLE_INTERVAL_S,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics, self._views = metrics, views
        self._min_interval_s, self._idle_interval_s = min_interval_s, idle_interval_s
        self._monotonic_s = monotonic_s
        self._renderer = Renderer()
        self._scraped_at_s = -SCRAPED_WITHIN_S
        self._resource_versions = (-1, -1)
        self._changes_seen = -1
        self.renderings = 0
        self.latest = Snapshot(b"", '""', 0.0)

    def serve(self) -> Snapshot:
        """The newest snapshot, at once; notes that somebody scrapes."""
        self._scraped_at_s = self._monotonic_s()
        return self.latest

    async def run(self) -> None:
        """Refresh for ever; ends by being cancelled."""
        while True:
            await self.refresh()
            await self._until_due()

    async def _until_due(self) -> None:
        refreshed_at_s = self._monotonic_s()
        while True:
            await asyncio.sleep(self._min_interval_s)
            now_s = self._monotonic_s()
            is_scraped = now_s - self._scraped_at_s < SCRAPED_WITHIN_S
            if now_s - refreshed_at_s >= self._idle_interval_s or (is_scraped and self._changed()):
                return

    def _changed(self) -> bool:
        versions = (self._views.vms()[0], self._views.migrations()[0])
        return versions != self._resource_versions or self._metrics.changes != self._changes_seen

    async def refresh(self) -> Snapshot:
        """Take the views now, render them in a worker thread, and keep the result."""
        frozen = self._freeze()
        snapshot = await in_thread(self._render, frozen)
        self.latest = snapshot
        self.renderings += 1
        return snapshot

    def _freeze(self) -> _Frozen:
        at_s = self._monotonic_s()
        self._changes_seen = self._metrics.changes
        vms_version, vms = self._views.vms()
        migrations_version, migrations = self._views.migrations()
        self._resource_versions = (vms_version, migrations_version)
        tracked = tracked_vms(vms, migrations)
        return _Frozen(
            vms=vms,
            migrations=migrations,
            checks=self._views.readiness(),
            transferred=self._metrics.migrations.freeze(tracked),
            dirty_pages=self._metrics.vms.freeze(tracked),
            sampled=self._metrics.sampling.freeze(tracked),
            inventory=self._metrics.devices.inventory,
            at_s=at_s,
        )

    def _render(self, frozen: _Frozen) -> Snapshot:
        body = generate_latest(self._metrics.registry) + self._renderer.render(
            (
                *migration_families(frozen.migrations, frozen.transferred),
                *vm_families(
                    frozen.vms, frozen.migrations, frozen.dirty_pages, frozen.sampled.rates
                ),
                *sampling_families(frozen.sampled),
                *readiness_families(frozen.checks),
                *device_families(frozen.inventory),
            )
        )
        digest = hashlib.blake2b(body, digest_size=12).hexdigest()
        return Snapshot(body, f'"{digest}"', frozen.at_s, gzipped=_gzip(body))


def _gzip(body: bytes) -> bytes:
    squeezing = zlib.compressobj(_FASTEST, zlib.DEFLATED, _GZIP_WRAPPER)
    return squeezing.compress(body) + squeezing.flush()
