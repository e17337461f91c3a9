"""What etcd's JSON gateway answers, strictly: whatever does not fit is a ValueError with the words.

Shapes are those of etcd's rpc.proto and kv.proto by way of protobuf's JSON mapping, as seen of
etcd 3.4 and 3.5:

- 64-bit integers are strings of digits, bytes are base64;
- what is zero, false or empty is left out: a missing `kvs` is an empty list, a missing `succeeded`
  is false, a missing `TTL` of a keep-alive says that the lease is gone;
- fields that are not known here may come, and are passed over.
"""

import base64
import binascii
import re
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from migrd.arbiter.store import Entry, Swapped

_DIGITS: Final = re.compile(r"-?[0-9]{1,20}")
_WORDS_AT_MOST: Final = 300


def _int64(value: object) -> object:
    if not isinstance(value, str) or not _DIGITS.fullmatch(value):
        raise ValueError("should be a 64-bit integer as a string")
    return int(value)


def _bytes(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError("should be base64")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("should be base64") from None


Int64 = Annotated[int, Field(ge=-(2**63), lt=2**64), BeforeValidator(_int64)]
Revision = Annotated[int, Field(ge=1, lt=2**63), BeforeValidator(_int64)]
Bytes = Annotated[bytes, BeforeValidator(_bytes)]


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class Header(_Message):
    """Who answered, and how far the store was."""

    cluster_id: Int64
    revision: Revision


class KeyValue(_Message):
    key: Bytes
    mod_revision: Revision
    value: Bytes = b""
    lease: Int64 = 0


class _Inner(_Message):
    kvs: tuple[KeyValue, ...] = ()


class Answer(_Message):
    """Every answer says who gave it."""

    header: Header


class RangeAnswer(Answer):
    kvs: tuple[KeyValue, ...] = ()

    def entry(self, key: str) -> Entry | None:
        """Of the one key that was asked for. Raises ValueError."""
        return _only(key, self.kvs)


class _TxnPart(_Message):
    response_range: _Inner | None = None


class TxnAnswer(Answer):
    succeeded: bool = False
    responses: tuple[_TxnPart, ...] = ()

    def swapped(self, key: str, value: bytes | None) -> Swapped:
        """What came of a compare-and-swap of one key to `value`. Raises ValueError."""
        if self.succeeded:
            entry = None if value is None else Entry(value, self.header.revision)
            return Swapped(is_applied=True, entry=entry)
        if len(self.responses) != 1 or self.responses[0].response_range is None:
            raise ValueError("responses: should hold what the key is now")
        return Swapped(is_applied=False, entry=_only(key, self.responses[0].response_range.kvs))


class LeaseAnswer(Answer):
    """Of a grant, and of a look at a lease."""

    id: Annotated[Int64, Field(alias="ID")]
    ttl_s: Annotated[Int64, Field(alias="TTL")] = 0
    """Left of it; 0 or less: it is gone."""


class KeepAliveAnswer(Answer):
    """etcd streams these, each wrapped as `result`; one is asked for."""

    result: LeaseAnswer

    @model_validator(mode="before")
    @classmethod
    def _lift(cls, given: Any) -> Any:
        result = given.get("result") if isinstance(given, dict) else None
        header = result.get("header") if isinstance(result, dict) else None
        return {"header": header, "result": result}


class TokenAnswer(Answer):
    token: Annotated[str, Field(min_length=1, max_length=16384, pattern=r"^[!-~]+$")]


class StatusAnswer(Answer):
    version: Annotated[str, Field(max_length=64)]
    leader: Int64 = 0
    errors: tuple[Annotated[str, Field(max_length=1024)], ...] = ()


class Problem(_Message):
    """What etcd says instead of an answer; `code` is gRPC's."""

    message: str
    code: int


def problem_of(body: bytes) -> Problem | None:
    """Of an answer that is none; None: these are not etcd's words."""
    try:
        return Problem.model_validate_json(body)
    except ValidationError:
        return None


def shown(text: str) -> str:
    """Words of others, as one bounded line."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "?" for c in line)[:_WORDS_AT_MOST]


def first_fault(wrong: Exception) -> str:
    """What of an answer does not fit, without the answer."""
    if not isinstance(wrong, ValidationError):
        return shown(str(wrong)) or type(wrong).__name__
    first: Any = wrong.errors(include_input=False, include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return shown(f"{where}: {first['msg']}" if where else str(first["msg"]))


def _only(key: str, kvs: tuple[KeyValue, ...]) -> Entry | None:
    if not kvs:
        return None
    if len(kvs) > 1 or kvs[0].key != key.encode():
        raise ValueError(f"kvs: should hold {key} and nothing else")
    return Entry(kvs[0].value, kvs[0].mod_revision)
