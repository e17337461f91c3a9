"""Certificates of the memory stream, both ways, TLS 1.3: the directory that QEMU's streams use too.

    ca-cert.pem                          the CA of all hosts
    server-cert.pem, server-key.pem      shown where the guest arrives; names this host
    client-cert.pem, client-key.pem      shown where it leaves; names this host

Read anew for each transfer, so a renewed certificate holds from the next one on. Blocking.
"""

import ssl
from pathlib import Path

from migrd.errors import ConfigError


def destination_context(directory: Path) -> ssl.SSLContext:
    """For a Receiver: asks for the source's certificate. Raises ConfigError naming the file."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, directory, "server")
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0  # nothing is resumed
    return context


def source_context(directory: Path) -> ssl.SSLContext:
    """For a Sender: checks that the destination's certificate names the host asked for."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, directory, "client")


def _context(protocol: int, directory: Path, role: str) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    cert, key, ca = (
        directory / name for name in (f"{role}-cert.pem", f"{role}-key.pem", "ca-cert.pem")
    )
    for path in (cert, key, ca):
        if not path.is_file():
            raise ConfigError(f"{path} is not there: migration.tls_dir must have it")
    try:
        context.load_cert_chain(cert, key, password=lambda: "")  # never asks on a terminal
        context.load_verify_locations(ca)
    except OSError as failure:  # ssl.SSLError is one
        raise ConfigError(f"{cert}, {key}, {ca}: not usable: {failure}") from failure
    return context
