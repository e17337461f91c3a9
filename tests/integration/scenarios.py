"""How the tests of failures begin and end: a guest that moves, and what must be true afterwards."""

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from migrd.cli.seen import Json
from migrd.demo.image import GuestImage
from tests.integration.fleet import BUSY, MIB, Fleet, fleet

SLOW: dict[str, Json] = {"max_bandwidth_bytes_per_s": 15 << 20}
"""BUSY dirties more than that: precopy goes on until something happens."""
FAST: dict[str, Json] = {"max_bandwidth_bytes_per_s": 0}
PATIENT: dict[str, Json] = {"downtime_limit_ms": 20_000}
"""So long a limit that all of the guest may be left for the switchover."""
PIECE_S = 0.006
"""What each 64 KiB takes on a slow road: some 10 MiB/s. (A bandwidth limit would not do: QEMU lifts
it for the switchover.)"""


@contextlib.asynccontextmanager
async def running(
    directory: Path,
    binary: Path,
    *,
    image: GuestImage = BUSY,
    proxied: bool = False,
    settings: Mapping[str, Mapping[str, str]] | None = None,
    links: Mapping[str, tuple[str, str]] | None = None,
    no_reboot: bool = False,
    small_disk: str | None = None,
) -> AsyncIterator[Fleet]:
    """A fleet whose guest counts on alpha; the options are those of `fleet`."""
    async with fleet(
        directory,
        (binary, binary),
        image=image,
        proxied=proxied,
        settings=settings,
        links=links,
        no_reboot=no_reboot,
        small_disk=small_disk,
    ) as two:
        await two.start_guest("alpha")
        yield two


async def in_precopy(two: Fleet, **more: Json) -> str:
    """A migration that is copying memory and will not end by itself."""
    migration = await two.migrate("alpha", "beta", **{"policy": SLOW, **more})
    await two.until(
        "alpha",
        migration,
        lambda seen: (
            seen["phase"] == "precopy" and (seen["progress"]["transferred_bytes"] or 0) > MIB
        ),
    )
    return migration


async def in_switchover(two: Fleet, **more: Json) -> str:
    """A migration whose guest stands still for some seconds while the rest is sent."""
    assert two.stream is not None, "make the fleet with proxied=True"
    two.stream.to_target.delay_s = PIECE_S
    migration = await two.migrate("alpha", "beta", **{"policy": PATIENT, **more})
    await two.phase("alpha", migration, "switchover")
    return migration


def has_condition(type_: str) -> Callable[[dict[str, Any]], bool]:
    """For `Fleet.until`: this condition stands."""
    return lambda seen: type_ in [condition["type"] for condition in seen["conditions"]]


def is_stopped(pid: int) -> bool:
    """Does the process stand still, by a signal? Blocking."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] == "T"


def full_speed(two: Fleet) -> None:
    """The road is no longer slow."""
    if two.stream is not None:
        two.stream.to_target.delay_s = 0.0


async def hurry(two: Fleet, migration: str) -> None:
    """Lift the bandwidth limit: it converges now."""
    await two.call("alpha", "PATCH", f"/v1/migrations/{migration}/policy", body=FAST)


async def moved(two: Fleet, migration: str, *, switches: int = 1) -> dict[str, Any]:
    """It succeeded, and the guest is whole on beta."""
    seen = await two.ended("alpha", migration)
    assert seen["phase"] == "succeeded", (seen["phase"], seen["cause"], seen["refusals"])
    assert seen["guest_runs_on"] == "destination"
    await two.only_qemus(1)
    await two.prove(switches, on="beta")
    return seen


async def stayed(two: Fleet, migration: str, phase: str, *causes: str) -> dict[str, Any]:
    """It ended as said, the guest is whole on alpha, beta has nothing left."""
    seen = await two.ended("alpha", migration)
    assert seen["phase"] == phase, seen["cause"]
    assert not causes or seen["cause"]["code"] in causes, seen["cause"]
    assert seen["guest_runs_on"] == "source"
    await two.only_qemus(1)
    await two.prove(0, on="alpha")
    return seen


async def moves_again(two: Fleet) -> None:
    """The same VM migrates as if nothing had been."""
    full_speed(two)
    await moved(two, await two.migrate("alpha", "beta", policy=FAST))


async def stays_and_moves_again(
    two: Fleet, migration: str, phase: str, *causes: str
) -> dict[str, Any]:
    """`stayed`, then it moves; and what had ended has ended."""
    seen = await stayed(two, migration, phase, *causes)
    await moves_again(two)
    assert (await two.migration("alpha", migration))["phase"] == phase
    return seen
