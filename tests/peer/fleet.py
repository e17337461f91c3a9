"""A fleet's certificates, made for one test, and a host of it that listens."""

import contextlib
import datetime
from collections.abc import AsyncIterator, Container
from pathlib import Path
from typing import Any

import trustme

from migrd.core.facts import TransferSettings, VmSpec
from migrd.engine.peer_service import PeerService
from migrd.peer.client import HttpPeer
from migrd.peer.server import PeerListener, serve_peers
from migrd.peer.tls import PeerTls, TlsFiles

VM = VmSpec("web-1", "small", {"memory_mib": 64, "net": True, "disk": "a.img"})
SETTINGS = TransferSettings(0.25, 10_000_000, multifd_channels=4, postcopy=True, peer_name="host-a")


class Fleet:
    """One CA and what it issued."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self.ca = trustme.CA()
        self._directory = directory
        self._name = name
        directory.mkdir(exist_ok=True)
        self.ca.cert_pem.write_to_path(str(directory / f"{name}.pem"))

    def issue(
        self,
        *names: str,
        file: str | None = None,
        common_name: str | None = None,
        expires: datetime.datetime | None = None,
    ) -> TlsFiles:
        """Write cert, key and CA of a host; `file` replaces what an earlier host wrote."""
        issued = self.ca.issue_cert(*names, common_name=common_name, not_after=expires)
        stem = self._directory / (file or f"{self._name}-{'-'.join(names) or common_name}")
        files = TlsFiles(
            stem.with_suffix(".crt"),
            stem.with_suffix(".key"),
            self._directory / f"{self._name}.pem",
        )
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        files.cert.write_bytes(chain)
        files.key.touch(mode=0o600)
        files.key.write_bytes(issued.private_key_pem.bytes())
        return files

    async def tls(self, name: str) -> PeerTls:
        return await PeerTls.load(self.issue(name), name)


@contextlib.asynccontextmanager
async def peer_at(url_or_port: str | int, tls: PeerTls, **more: Any) -> AsyncIterator[HttpPeer]:
    """host-b as a peer that is not kept warm: the test decides when it speaks."""
    url = f"https://127.0.0.1:{url_or_port}" if isinstance(url_or_port, int) else url_or_port
    peer = HttpPeer("host-b", url, tls, **more)
    try:
        yield peer
    finally:
        await peer.close()


@contextlib.asynccontextmanager
async def host(
    fleet: Fleet,
    service: PeerService,
    *,
    name: str = "host-b",
    roster: Container[str] = frozenset({"host-a", "host-c"}),
    port: int = 0,
) -> AsyncIterator[PeerListener]:
    """A host of the fleet, listening on loopback."""
    tls = await fleet.tls(name)
    async with serve_peers(service, roster, tls, "127.0.0.1", port) as listener:
        yield listener
