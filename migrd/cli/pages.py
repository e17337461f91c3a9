"""Lists that come in pages."""

from collections.abc import Mapping
from typing import Final

from migrd.cli.client import Client, path
from migrd.cli.seen import Json, Seen

_MOST_PAGES: Final = 1000
"""A daemon that hands out page tokens for ever must not keep us for ever."""


async def every_item(
    client: Client,
    *segments: str,
    pages: int | None = None,
    query: Mapping[str, str] | None = None,
) -> dict[str, Json]:
    """The list as one document, from its first `pages` pages (None: all)."""
    items: list[Json] = []
    document: dict[str, Json] = {}
    token: str | None = None
    for _ in range(pages or _MOST_PAGES):
        asked = {**(query or {}), **({"page_token": token} if token else {})}
        seen = (await client.call("GET", path(*segments), query=asked)).seen
        document = dict(seen.body)
        listed = seen.body.get("items")
        items += listed if isinstance(listed, list) else []
        token = seen.raw("next_page_token")
        if not token:
            break
    return {**document, "items": items}


async def items_after(client: Client, known: int, *segments: str) -> list[Seen]:
    """The items of a list behind the first `known`."""
    document = await every_item(client, *segments)
    return Seen(document).parts("items")[known:]
