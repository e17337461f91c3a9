"""A scrape is compressed for who accepts it, and named apart from the plain one."""

import gzip
from pathlib import Path

import aiohttp
import pytest

from migrd.api.app import build_app
from migrd.api.conditions import accepts_gzip
from migrd.api.server import serving
from migrd.api.table import Scrape
from migrd.metrics import Exposition, Metrics
from tests.api.running import Got
from tests.fakes.service import FakeService
from tests.metrics.views import Host, vm_view

PLAIN = b"# TYPE up gauge\nup 1\n"
SCRAPE = Scrape(PLAIN, "text/plain", '"abc"', gzip.compress(PLAIN))


async def scraped(path: Path, scrape: Scrape, **headers: str) -> Got:
    """What a client with these headers gets, as it comes over the wire."""
    app = build_app(FakeService(), metrics=lambda: scrape)
    async with serving(app) as server:
        await server.serve_unix(path)
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(str(path)), auto_decompress=False
            ) as session,
            session.get(
                "http://m/metrics",
                headers={name.replace("_", "-"): value for name, value in headers.items()},
                skip_auto_headers=("Accept-Encoding",),
            ) as reply,
        ):
            return Got(reply.status, reply.headers.copy(), await reply.read())


async def test_who_accepts_gzip_gets_it_under_a_tag_of_its_own(tmp_path: Path) -> None:
    got = await scraped(tmp_path / "s", SCRAPE, Accept_Encoding="deflate, gzip;q=0.5")
    assert gzip.decompress(got.body) == PLAIN
    assert got.headers["Content-Encoding"] == "gzip"
    assert got.headers["ETag"] == '"abc-gzip"'
    assert got.headers["Vary"] == "Accept-Encoding"


async def test_everybody_else_gets_plain_bytes(tmp_path: Path) -> None:
    for headers in ({}, {"Accept_Encoding": "identity"}, {"Accept_Encoding": "gzip;q=0"}):
        got = await scraped(tmp_path / "s", SCRAPE, **headers)
        assert (got.body, got.headers["ETag"]) == (PLAIN, '"abc"')
        assert "Content-Encoding" not in got.headers


async def test_a_scrape_that_was_not_compressed_is_sent_as_it_is(tmp_path: Path) -> None:
    got = await scraped(tmp_path / "s", Scrape(PLAIN, "t/p", '"a"'), Accept_Encoding="gzip")
    assert (got.body, got.headers["ETag"]) == (PLAIN, '"a"')


async def test_each_tag_is_known_in_its_own_encoding_only(tmp_path: Path) -> None:
    for tag, accepted, status in (
        ('"abc-gzip"', "gzip", 304),
        ('"abc"', "gzip", 200),
        ('"abc"', "identity", 304),
        ('"abc-gzip"', "identity", 200),
    ):
        got = await scraped(tmp_path / "s", SCRAPE, If_None_Match=tag, Accept_Encoding=accepted)
        assert got.status == status, (tag, accepted)


@pytest.mark.parametrize(
    ("offered", "takes"),
    [
        ("gzip", True),
        ("GZIP ; q=1.0", True),
        ("br, x-gzip", True),
        ("", False),
        ("*", False),
        ("gzip;q=0.000", False),
        ("gzipped", False),
    ],
)
def test_what_an_offer_means(offered: str, takes: bool) -> None:
    assert accepts_gzip(offered) is takes


async def test_the_exposition_compresses_what_it_rendered() -> None:
    snapshot = await Exposition(Metrics(), Host(known=[vm_view("web")])).refresh()
    assert b'vm="web"' in snapshot.body
    assert gzip.decompress(snapshot.gzipped) == snapshot.body
