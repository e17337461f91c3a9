"""Whom a certificate names, as `ssl.SSLSocket.getpeercert` tells it."""

from typing import Any


def identity(peercert: Any) -> tuple[str, ...]:
    """The names in a peer's verified certificate: its DNS names, or else its common name."""
    found = peercert or {}
    names = [value.lower() for kind, value in found.get("subjectAltName", ()) if kind == "DNS"]
    if not names:
        pairs = (pair for relative in found.get("subject", ()) for pair in relative)
        names = [value.lower() for kind, value in pairs if kind == "commonName"]
    return tuple(dict.fromkeys(names))
