"""ETag, If-Match, If-None-Match, pages, long polls: the parts of HTTP that several routes share.

The tag of a resource is its generation (a VM's: its resource_version): the state a client can see.
Figures that merely age with the clock (`elapsed_ms`, `facts_age_ms`) are no part of it.

A page token says where the last page ended, so pages stay right while migrations come and go. A
long poll answers as soon as anything is newer than the version named, or when its time is over, and
then with the state as it is: a client that was waiting knows more after every answer. A version
that this daemon has not reached yet is from before its restart: that is answered at once.
"""

import asyncio
import base64
import binascii
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Final, TypeVar

from pydantic import Field

from migrd.api.problems import PreconditionFailed
from migrd.api.table import Call
from migrd.api.wire import LARGEST_EXACT, Flag, WireModel
from migrd.errors import Invalid, Violation

T = TypeVar("T")

MAX_WATCH_S: Final = 300.0
_TAG = re.compile(r'(W/)?"([^"]*)"')

ETagList = Annotated[str, Field(max_length=1024, examples=['"12"'])]
Whole = Annotated[int, Field(ge=0, le=LARGEST_EXACT)]


class WatchQuery(WireModel):
    """Parameters of a resource that can be watched."""

    watch: Flag = False
    """Wait until something is newer than `resource_version`, or `timeout_s` is over."""
    resource_version: Whole | None = None
    """What the last answer said; left out: answer at once."""
    timeout_s: Annotated[float, Field(ge=0, le=MAX_WATCH_S)] = 30.0


class NoneMatch(WireModel):
    """Headers of a read."""

    if_none_match: Annotated[ETagList | None, Field(alias="If-None-Match")] = None
    """The ETag of what the client has: 304 when it is still so."""


class Match(WireModel):
    """Headers of a change."""

    if_match: Annotated[ETagList | None, Field(alias="If-Match")] = None
    """The ETag of what the client has seen: 412 when it has changed since."""


def tag(version: int) -> str:
    return f'"{version}"'


def is_known(headers: NoneMatch, current: str) -> bool:
    """The client has this already (weak comparison, RFC 9110 section 13.1.2)."""
    given = headers.if_none_match
    if given is None:
        return False
    return given.strip() == "*" or any(
        f'"{opaque}"' == current for _, opaque in _TAG.findall(given)
    )


def accepts_gzip(accept_encoding: str) -> bool:
    """Whether a client takes gzip (RFC 9110 section 12.5.3). What is odd means no: plain bytes are
    always understood."""
    for offer in accept_encoding.split(","):
        coding, _, weight = offer.partition(";")
        if coding.strip().lower() in ("gzip", "x-gzip"):
            return not re.fullmatch(r"\s*q\s*=\s*0(\.0*)?\s*", weight)
    return False


def require_match(headers: Match, current: str) -> None:
    """Raises PreconditionFailed (strong comparison, RFC 9110 section 13.1.1)."""
    given = headers.if_match
    if given is None or given.strip() == "*":
        return
    strong = [f'"{opaque}"' for weak, opaque in _TAG.findall(given) if not weak]
    if current not in strong:
        raise PreconditionFailed(
            f"it has changed: the ETag is {current} now, not {given}; look again, then decide"
        )


async def newer_anywhere(call: Call, query: WatchQuery, version: int) -> bool:
    """For lists: wait while the daemon's `version` is the one the watcher has seen; True when it
    was waited for, so that the list must be asked for again."""
    if not query.watch or query.resource_version != version:
        return False
    await _newer_or_closing(call, version, query.timeout_s)
    return True


async def newer_than_seen(call: Call, query: WatchQuery, current: Callable[[], int]) -> None:
    """For one resource: wait while `current()` is the version the watcher has seen."""
    seen = query.resource_version
    if not query.watch or seen is None:
        return
    loop = asyncio.get_running_loop()
    until_s, version = loop.time() + query.timeout_s, seen
    while current() == seen and not call.site.closing.is_set():
        left_s = until_s - loop.time()
        if left_s <= 0:
            return
        version = await _newer_or_closing(call, version, left_s)


async def _newer_or_closing(call: Call, version: int, within_s: float) -> int:
    """The daemon's version once it exceeds `version`; `version` when time is over or it stops."""
    try:
        async with asyncio.TaskGroup() as tasks:
            closing = tasks.create_task(call.site.closing.wait())
            newer = tasks.create_task(call.service.wait_newer(version, within_s=within_s))
            await asyncio.wait((closing, newer), return_when=asyncio.FIRST_COMPLETED)
            closing.cancel()
            newer.cancel()
    except ExceptionGroup as group:
        raise group.exceptions[0] from None  # of the one call there was
    return version if newer.cancelled() else newer.result()


def write_token(key: tuple[float, str] | str | int) -> str:
    """Where a page ended, opaque to clients."""
    text = f"{key[0]!r} {key[1]}" if isinstance(key, tuple) else str(key)
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def read_token(token: str, read: Callable[[str], T]) -> T:
    """Raises Invalid for a token that was not made here."""
    try:
        padded = token + "=" * (-len(token) % 4)
        return read(base64.b64decode(padded, altchars=b"-_", validate=True).decode())
    except (ValueError, binascii.Error, UnicodeDecodeError):
        message = "page_token is not one that this daemon gave"
        raise Invalid(message, [Violation("page_token", "bad_token", message)]) from None


def page(items: Sequence[T], offset: int, limit: int) -> tuple[Sequence[T], str | None]:
    """One page of a list that only grows at its end, and the token of the next."""
    end = offset + limit
    return items[offset:end], write_token(end) if end < len(items) else None
