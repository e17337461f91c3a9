"""Passthrough devices on the command line: `--device`, `--tracking`, and what they ask for."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import click

from migrd.cli.seen import Json
from migrd.core.tracking import TrackingPolicy

Command = TypeVar("Command", bound=Callable[..., Any])

_WITHOUT_DOMAIN: Final = re.compile(r"[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")
_GIVEN: Final = re.compile(
    r"(?:(?P<id>[^=@/]+)=)?(?P<address>[^=@/]+)(?:@(?P<bus>[^=@/]+)(?:/(?P<slot>[^=@/]+))?)?"
)
_FORM: Final = "[ID=]ADDRESS[@BUS[/SLOT]]"


@dataclass(frozen=True)
class Given:
    """One `--device`."""

    address: str
    id: str | None = None
    bus: str | None = None
    slot: str | None = None

    def body(self) -> dict[str, Json]:
        """The API's words for it, with nothing in it that was not said."""
        said: dict[str, Json] = {
            "address": self.address,
            "id": self.id,
            "guest_bus": self.bus,
            "guest_address": self.slot,
        }
        return {name: value for name, value in said.items() if value is not None}


def whole_address(given: str) -> str:
    """What `lspci` prints lacks the PCI domain; there is mostly one, 0000."""
    lower = given.lower()
    return f"0000:{lower}" if _WITHOUT_DOMAIN.fullmatch(lower) else lower


def given_device(text: str) -> Given:
    """For an option: `41:00.2`, `hostdev1=0000:41:00.2`, `41:00.2@rp0`, `41:00.2@pcie.0/05.0`."""
    match = _GIVEN.fullmatch(text)
    if match is None:
        raise click.BadParameter(f"{text!r} is not {_FORM}")
    return Given(whole_address(match["address"]), match["id"], match["bus"], match["slot"])


def there(text: str) -> tuple[str, str]:
    """For an option: `hostdev0=0000:81:00.2`."""
    id_, sign, address = text.partition("=")
    if not sign or not id_ or not address:
        raise click.BadParameter(f"{text!r} is not ID=ADDRESS")
    return id_, whole_address(address)


def device_options(command: Command) -> Command:
    """`--device` and `--tracking`; they arrive as `devices` and `tracking`."""
    return _device(_tracking(command))


def asked_for(devices: Sequence[Given], tracking: str | None) -> dict[str, Json]:
    """What was said, in the API's words."""
    body: dict[str, Json] = {}
    if devices:
        body["devices"] = [device.body() for device in devices]
    if tracking is not None:
        body["tracking_policy"] = tracking
    return body


_device: Final = click.option(
    "--device",
    "devices",
    type=given_device,
    metavar=_FORM,
    multiple=True,
    help="A passthrough device (`migrd devices` lists them); may be given several times.",
)
_tracking: Final = click.option(
    "--tracking",
    type=click.Choice([policy.value for policy in TrackingPolicy]),
    help="When to ask for dirty tracking; else this host's default.",
)
