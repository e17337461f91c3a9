"""A fleet's certificates, made for one test, and a host of it that listens."""

import contextlib
import datetime
from collections.abc import AsyncIterator, Container
from pathlib import Path

import trustme

from migrd.engine.peer_service import PeerService
from migrd.peer.server import PeerListener, serve_peers
from migrd.peer.tls import PeerTls, TlsFiles


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
