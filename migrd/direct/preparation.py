"""What is looked at before a guest sets out: settings, certificates, and who watches its memory."""

import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

from migrd.core.bitmap import DirtyBitmap
from migrd.core.facts import TransferSettings
from migrd.core.memory_map import PAGE_BYTES
from migrd.direct.handoff import HandedOver
from migrd.direct.offer import OfferedDeviceLog, OfferedHwpt
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
    watched = DirtyBitmap(client.memory.pages)
    for source in client.sources:
        if isinstance(source, OfferedHwpt | OfferedDeviceLog):
            for one in source.ranges:
                watched.mark(one.first_page, one.length_bytes // PAGE_BYTES)
    left = client.memory.full()
    left.subtract(watched)
    pages = left.count()
    if pages:
        ids = ", ".join(device.id for device in client.devices)
        yield (
            f"{pages} pages of its memory have no source that watches what its devices ({ids}) "
            "write by DMA; hand over a page table (HWPT) or the log of each device"
        )
