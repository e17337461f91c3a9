"""Diffie-Hellman parameters for QEMU's TLS server, without making new ones.

QEMU generates parameters each time it loads server credentials whose directory has no
dh-params.pem: about a second of every migration. The group ffdhe2048 of RFC 7919 (appendix A.1)
serves all, and is given there by a formula:

    p = 2^2048 - 2^1984 + (floor(2^1918 * e) + 560316) * 2^64 - 1,  g = 2
"""

import base64
from typing import Final

_BITS: Final = 2048
_OFFSET: Final = 560316
_GUARD_BITS: Final = 64


def ffdhe2048() -> int:
    """The prime."""
    e_part = _scaled_e(_BITS - 130)
    high: int = 2**_BITS - 2 ** (_BITS - 64)
    return high + (e_part + _OFFSET) * 2**64 - 1


def _scaled_e(bits: int) -> int:
    """floor(2^bits * e), by its series in whole numbers."""
    term = total = 1 << (bits + _GUARD_BITS)
    n = 1
    while term:
        term //= n
        total += term
        n += 1
    return total >> _GUARD_BITS


def dh_params_pem() -> str:
    """PKCS #3 DHParameter { prime, base } in PEM, as gnutls reads it."""
    body = _der(0x30, _integer(ffdhe2048()) + _integer(2))
    text = base64.encodebytes(body).decode("ascii")
    return f"-----BEGIN DH PARAMETERS-----\n{text}-----END DH PARAMETERS-----\n"


def _integer(number: int) -> bytes:
    return _der(0x02, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def _der(tag: int, content: bytes) -> bytes:
    length = len(content)
    if length < 0x80:
        return bytes([tag, length]) + content
    size = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(size)]) + size + content
