"""One request to one member of an etcd cluster, and what its failure proves.

    not_sent   no connection was made: certainly not delivered
    refused    etcd said no, by a code that means that nothing was done; or it is no etcd
    odd        something came that is no answer
    late       sent, and no answer in time
    lost       sent, and the connection broke

All but the first two leave open whether a write took effect. aiohttp repeats a POST by no means.
"""

import asyncio
import os
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Final, TypeVar

import aiohttp
from yarl import URL

from migrd.arbiter.answers import Answer, first_fault, problem_of, shown
from migrd.engine.threads import in_thread

Observe = Callable[[str, str, float], None]
"""(op, result, seconds) of each request; results are RESULTS."""

RESULTS: Final = ("ok", "refused", "odd", "late", "lost", "not_sent")
UNAUTHENTICATED: Final = 16
_NOT_APPLIED: Final = frozenset({3, 5, 7, 8, 9, 12, UNAUTHENTICATED})
"""gRPC codes that say that nothing was done: invalid argument, not found, permission denied,
resource exhausted, failed precondition, unimplemented, unauthenticated."""
_CURES: Final = {
    "user name is empty": "set [arbiter] user and password_file",
    "invalid user ID or password": "look at [arbiter] user and at what is in password_file",
    "permission denied": "give the user's role readwrite on the keys below [arbiter] prefix",
    "database space exceeded": "compact and defragment etcd, then: etcdctl alarm disarm",
}
_ANSWER_BYTES: Final = 8 << 20
_READ_ON_LOOP_BYTES: Final = 1 << 15
_IDLE_S: Final = 60.0
_CONNECTIONS_AT_MOST: Final = 16

A = TypeVar("A", bound=Answer)


@dataclass(frozen=True)
class Op:
    """One of etcd's calls."""

    name: str
    path: str
    is_write: bool = False
    """Must not be repeated when it may have been delivered."""
    is_linear: bool = False
    """Answered with the newest revision there is."""


@dataclass(frozen=True)
class Failed:
    """A request without a usable answer."""

    result: str
    words: str
    code: int | None = None
    """gRPC's, where etcd named one."""

    @property
    def may_have_applied(self) -> bool:
        return self.result not in ("not_sent", "refused")


@dataclass
class _Attempt:
    """How far one try came; filled in by aiohttp's tracing."""

    has_connection: bool = False


class Members:
    """Connections to all members of a cluster."""

    def __init__(self, *, attempt_s: float, observe: Observe | None = None) -> None:
        self._attempt_s = attempt_s
        self._observe = observe
        self._session = _session(attempt_s)

    async def close(self) -> None:
        await self._session.close()

    async def ask(
        self, url: str, op: Op, body: bytes, answer: type[A], tls: ssl.SSLContext, token: str | None
    ) -> A | Failed:
        """The answer of the member at `url`, or why there is none. Raises nothing."""
        started_s, attempt = time.monotonic(), _Attempt()
        try:
            async with asyncio.timeout(self._attempt_s):
                status, text = await self._post(url, op, body, tls, token, attempt)
            found = await _read(status, text, answer)
        except TimeoutError:  # an OSError too: first
            found = self._late(attempt)
        except (aiohttp.ClientError, OSError) as failure:
            found = Failed("lost" if attempt.has_connection else "not_sent", _why(failure))
        except (ValueError, RecursionError) as wrong:  # pydantic's is a ValueError
            found = Failed("odd", f"not an answer of etcd: {first_fault(wrong)}")
        if self._observe is not None:
            result = found.result if isinstance(found, Failed) else "ok"
            self._observe(op.name, result, time.monotonic() - started_s)
        return found

    def _late(self, attempt: _Attempt) -> Failed:
        if attempt.has_connection:
            return Failed("late", f"no answer within {self._attempt_s:g} s")
        return Failed("not_sent", f"no connection within {self._attempt_s:g} s")

    async def _post(
        self,
        url: str,
        op: Op,
        body: bytes,
        tls: ssl.SSLContext,
        token: str | None,
        attempt: _Attempt,
    ) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if token is not None:
            headers["Authorization"] = token
        async with self._session.post(
            URL(url).with_path(op.path),
            data=body,
            headers=headers,
            ssl=tls,
            allow_redirects=False,
            trace_request_ctx=attempt,
        ) as response:
            text = bytearray()
            async for chunk in response.content.iter_any():
                text += chunk
                if len(text) > _ANSWER_BYTES:
                    raise ValueError(f"it has more than {_ANSWER_BYTES} bytes")
            return response.status, bytes(text)


async def _read(status: int, text: bytes, answer: type[A]) -> A | Failed:
    """Raises ValueError, RecursionError."""
    if status != 200:
        return _refusal(status, text)
    if len(text) > _READ_ON_LOOP_BYTES:  # a large fleet's roster
        return await in_thread(answer.model_validate_json, text)
    return answer.model_validate_json(text)


def _refusal(status: int, text: bytes) -> Failed:
    problem = problem_of(text)
    if problem is None:
        # whoever this is, it has not done what etcd does, unless it stands before an etcd
        words = f"HTTP status {status}, and not etcd's words: is this an etcd of 3.4 or newer?"
        return Failed("refused" if status in (404, 405, 501) else "odd", words)
    words = shown(problem.message) or f"HTTP status {status}"
    cure = next((cure for part, cure in _CURES.items() if part in words), None)
    if cure is not None:
        words = f"{words}: {cure}"
    result = "refused" if problem.code in _NOT_APPLIED else "odd"
    return Failed(result, words, problem.code)


def _why(failure: Exception) -> str:
    """Without aiohttp's wrapping, which names objects instead of hosts."""
    if isinstance(failure, aiohttp.ClientConnectorCertificateError):
        wrong = failure.certificate_error
        return shown(getattr(wrong, "verify_message", "") or str(wrong))
    if isinstance(failure, aiohttp.ClientConnectorError):
        wrong_os = failure.os_error
        number = wrong_os.errno or 0  # negative for name look-ups, whose text is good
        words = os.strerror(number) if number > 0 else wrong_os.strerror or str(wrong_os)
        return shown(words)
    return shown(str(failure)) or type(failure).__name__


def _session(attempt_s: float) -> aiohttp.ClientSession:
    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(_connected)
    trace.on_connection_reuseconn.append(_connected)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=_CONNECTIONS_AT_MOST, keepalive_timeout=_IDLE_S, ttl_dns_cache=30
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=attempt_s),
        trace_configs=[trace],
        auto_decompress=False,
        trust_env=False,
    )


async def _connected(_: aiohttp.ClientSession, trace: SimpleNamespace, __: object) -> None:
    trace.trace_request_ctx.has_connection = True
