"""The options that say how a migration may go, for `plan`, `migrate` and `policy`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from migrd.cli.seen import Json
from migrd.cli.units import rate, whole_ms, whole_s
from migrd.core.migration import WhenNotConverging

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class Wishes:
    """What was said; None: the daemon's default, or what is in force."""

    when_not_converging: str | None = None
    downtime_limit_ms: int | None = None
    deadline_s: int | None = None
    max_bandwidth: int | None = None
    max_throttle_percent: int | None = None

    def policy(self) -> dict[str, Json]:
        """The API's policy, with nothing in it that was not said."""
        said: dict[str, Json] = {
            "when_not_converging": self.when_not_converging,
            "downtime_limit_ms": self.downtime_limit_ms,
            "deadline_s": self.deadline_s,
            "max_bandwidth_bytes_per_s": self.max_bandwidth,
            "max_throttle_percent": self.max_throttle_percent,
        }
        return {key: value for key, value in said.items() if value is not None}


def policy_options(command: Command) -> Command:
    """Add the options to a command; they arrive as the fields of Wishes."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


_OPTIONS = (
    click.option(
        "--downtime-limit-ms",
        type=whole_ms,
        metavar="N",
        help="Longest acceptable blackout: 300, 300ms, 1.5s.",
    ),
    click.option(
        "--deadline-s",
        type=whole_s,
        metavar="N",
        help="Roll back when the guest has not moved by then: 600, 10min, 2h.",
    ),
    click.option(
        "--max-bandwidth",
        type=rate,
        metavar="RATE",
        help="Limit of the stream: 100MiB/s, 10Gbit/s, unlimited.",
    ),
    click.option(
        "--when-not-converging",
        type=click.Choice([choice.value for choice in WhenNotConverging]),
        help="What to do when the guest dirties memory faster than it can be sent.",
    ),
    click.option(
        "--max-throttle-percent",
        type=int,
        metavar="N",
        help="Strongest slowing of the vCPUs, with throttle.",
    ),
)
