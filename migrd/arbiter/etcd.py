"""Keys in etcd: `store.Store` by range and transaction.

A compare-and-swap is one transaction: if the key's mod_revision is the expected one, put (or
delete) it, else say what it is now. The revision of what was put is that of the transaction.
"""

from base64 import b64encode

from migrd.arbiter.answers import RangeAnswer, TxnAnswer
from migrd.arbiter.gateway import RANGE, TXN, Gateway
from migrd.arbiter.store import Entry, Swapped


def encoded_key(key: str) -> str:
    """As the gateway wants bytes."""
    return b64encode(key.encode()).decode()


class EtcdStore:
    """On a gateway that somebody else closes."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def get(self, key: str) -> Entry | None:
        message = {"key": encoded_key(key)}
        return await self._gateway.call(RANGE, message, RangeAnswer, lambda a: a.entry(key))

    async def swap(self, key: str, expected: int, value: bytes | None) -> Swapped:
        name = encoded_key(key)
        if value is None:
            wanted: dict[str, object] = {"request_delete_range": {"key": name}}
        else:
            wanted = {"request_put": {"key": name, "value": b64encode(value).decode()}}
        is_as_expected = {
            "key": name,
            "target": "MOD",
            "result": "EQUAL",
            "mod_revision": str(expected),
        }
        message = {
            "compare": [is_as_expected],
            "success": [wanted],
            "failure": [{"request_range": {"key": name}}],
        }
        read = lambda a: a.swapped(key, value)  # noqa: E731 - named for the line's length
        return await self._gateway.call(TXN, message, TxnAnswer, read)
