"""Requests made up from the document, sent to a live API: no answer may contradict the document.

The seed is fixed, so a failure here is the same failure everywhere.
"""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from migrd.api import openapi
from migrd.api.auth import Scope, Token, load_tokens, new_token
from migrd.core.phases import Phase
from tests.api.running import running
from tests.fakes.service import FakeService

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
]
EXAMPLES = 25

document: Any = schemathesis.openapi.from_dict(openapi.document())
finite = document.exclude(path="/v1/events")  # a stream that does not end


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """(address, token) of an API in a thread of its own, with something of everything in it."""
    directory = tmp_path_factory.mktemp("live")
    token, line = new_token("schemathesis", Scope.WRITE)
    (directory / "tokens").write_text(line)
    known = load_tokens(directory / "tokens")
    ready: Future[int] = Future()
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    async def serve(directory: Path, known: tuple[Token, ...]) -> None:
        service = FakeService()
        async with running(directory, service=service) as api:
            for number, phase in enumerate((Phase.PRECOPY, Phase.GRANTED, Phase.SUCCEEDED)):
                id_ = await api.begun(f"vm-{number}")
                api.service.drive_to(id_, phase)
                api.service.add_round(id_)
            ready.set_result(await api.server.serve_tcp("127.0.0.1", 0, tokens=known))
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(directory, known),))
    thread.start()
    yield f"http://127.0.0.1:{ready.result(timeout=10)}", token
    loop.call_soon_threadsafe(stop.set)
    thread.join(timeout=10)
    loop.close()


@finite.parametrize()  # type: ignore[untyped-decorator]  # schemathesis is untyped
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_the_api_answers_as_the_document_says(case: Any, live: tuple[str, str]) -> None:
    url, token = live
    headers = {"Authorization": f"Bearer {token}"}
    case.call_and_validate(base_url=url, headers=headers, checks=CHECKS, timeout=10)
