"""What is looked at before a guest sets out: settings, certificates, and who watches its memory."""

import ssl
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from migrd.core.facts import TransferSettings
from migrd.core.memory_map import PAGE_BYTES, MemoryMap
from migrd.direct.handoff import HandedOver
from migrd.direct.offer import OfferedDeviceLog, OfferedHwpt, OfferedSource
from migrd.engine.ports import TlsIdentity
from migrd.engine.threads import in_thread
from migrd.errors import ConfigError, VmmRefused


def refuse_unfit(settings: TransferSettings, tls: TlsIdentity | None) -> None:
    """Raises VmmRefused."""
    if settings.tls and tls is None:
        raise VmmRefused(
            "the stream is to be encrypted, and there is no TLS identity",
            code="tls_identity_missing",
        )
    if tls is not None and not settings.tls:
        raise VmmRefused(
            "this host encrypts its streams, and the stream of this migration is to be plain: set "
            "migration.tls alike on both hosts",
            code="tls_mismatch",
        )
    if settings.tls and not settings.peer_name:  # else anybody whom the CA knows would do
        raise VmmRefused("the stream is to be encrypted, and with whom is not said")
    if settings.postcopy:
        raise VmmRefused("the direct engine does no postcopy", code="no_postcopy")


async def stream_context(
    make: Callable[[Path], ssl.SSLContext], settings: TransferSettings, tls: TlsIdentity | None
) -> ssl.SSLContext | None:
    """None: the stream is not encrypted. Raises VmmRefused."""
    refuse_unfit(settings, tls)
    if not settings.tls or tls is None:
        return None
    try:
        return await in_thread(make, Path(tls.directory))
    except ConfigError as failure:
        raise VmmRefused(failure.message, code="tls_identity_unusable") from failure


def blocked_reasons(client: HandedOver) -> Iterator[str]:
    """Why the guest cannot be moved. Writes of its CPUs are watched wherever there is memory: else
    its hand-over was refused. Those of its devices are watched by other sources."""
    if not client.has_offered or not client.devices:
        return
    pages = unwatched_pages(client.memory, client.sources, len(client.devices))
    if pages:
        ids = ", ".join(device.id for device in client.devices)
        yield (
            f"{pages} pages of its memory have no source that watches what its devices ({ids}) "
            "write by DMA; hand over a page table (HWPT), or the log of each device"
        )


def unwatched_pages(memory: MemoryMap, sources: Iterable[OfferedSource], devices: int) -> int:
    """Pages that a device may write unseen. A page table sees all devices behind it; a device's log
    sees that device alone, so there must be as many as there are devices."""
    changes: dict[int, tuple[int, int]] = {}

    def add(first_page: int, pages: int, is_memory: int, watchers: int) -> None:
        for page, sign in ((first_page, 1), (first_page + pages, -1)):
            before = changes.get(page, (0, 0))
            changes[page] = before[0] + sign * is_memory, before[1] + sign * watchers

    for region in memory.regions:
        add(region.first_page, region.pages, 1, 0)
    for source in sources:
        if isinstance(source, OfferedHwpt | OfferedDeviceLog):
            watchers = devices if isinstance(source, OfferedHwpt) else 1
            for one in source.ranges:
                add(one.first_page, one.length_bytes // PAGE_BYTES, 0, watchers)
    unwatched = before = is_memory = watched_by = 0
    for page, (more_memory, more_watchers) in sorted(changes.items()):
        if is_memory and watched_by < devices:
            unwatched += page - before
        before, is_memory, watched_by = page, is_memory + more_memory, watched_by + more_watchers
    return unwatched
