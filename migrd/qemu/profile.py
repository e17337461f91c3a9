"""Launch profiles: what an administrator allows to be launched, and what a request may fill in.

    config/profiles/<name>.toml ──load──► LaunchProfile        checked whole, every problem at once
                                              │
    VmSpec(profile, parameters) ──resolve─────┤                typed, bounded, paths resolved
                                              ▼
                                          Resolved ──► argv    (launch adds monitors, -S, …)
                                              └──────► digest  (preflight compares the two hosts')

Rules
1. A request names a profile and fills typed parameters. It never writes an argument: values are
   escaped for QEMU's syntax (migrd.qemu.command_line) and never reach a shell.
2. A parameter without a default is required. A path is given relative to its directory `below`, or
   absolute within it; links are followed first, and what they lead to must be within it as well.
3. The machine type is versioned. An alias such as `q35` means another machine in each QEMU, and the
   guest would not survive the move. The type must exist in the QEMU of both hosts.
4. The digest covers what the guest can see: machine, CPU, memory, devices, and the contents of
   firmware. It covers no host paths and no back ends, which may differ; values of path parameters
   are left out for the same reason. Of a passthrough device it covers id, order and what the guest
   sees of it, not which one of the host it is (migrd.qemu.digest).
5. Passthrough devices come with a request only where `[passthrough] allowed = true` says so.

Traps
- A path is resolved when it is checked and opened by QEMU later: whoever may write in `below` can
  exchange it in between. Such a directory belongs to the administrator.
- TCG and KVM give different machines: a guest that moves between them completes and then hangs.
  The accelerator is therefore always named, and part of the digest.
- QEMU before 9.0 loses dirty pages of TCG guests: its fast way of fetching the dirty bitmap forgets
  the software TLBs, so a page that is written on and on is sent once and never again (seen: a
  counter that went back by 300 ms). It takes that way only for RAM whose size is a multiple of
  64 pages; so under TCG a guest gets two pages more than the profile says, in every QEMU, as both
  hosts must agree. Not where the profile makes the memory itself (`memory-backend=`).
- `serial = true` writes what the guest prints to a file, as fast as it likes and without a bound:
  for guests that are trusted. A file needs no reader and never blocks the guest.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from migrd.errors import Invalid, Violation
from migrd.profiles.content import content_digest
from migrd.profiles.files import shown
from migrd.profiles.filling import checked_values, name_problems
from migrd.profiles.parameters import IntegerParameter, Parameter, PathParameter, Value
from migrd.qemu import command_line
from migrd.qemu.allowance import PassthroughRules, Wanted, refused_devices
from migrd.qemu.command_line import Argument, Placeholder, TemplateError, UnfitValue
from migrd.qemu.digest import launch_digest, visible_device

TCG_EXTRA_KIB: Final = 8


class LaunchProfile(BaseModel):
    """One file of `profiles_dir`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    """That of the file, without .toml."""
    description: str = Field(min_length=1)
    binary: str = Field(pattern=r"^/[^\x00-\x1f]+$")
    """Absolute path of QEMU, or of a script that ends in `exec`ing it."""
    machine: str = Field(pattern=r"^[A-Za-z0-9._-]+(,[^\x00-\x1f{}]+)?$")
    """Versioned machine type, with its options: `pc-q35-7.2,usb=off`."""
    accelerator: str = Field(pattern=r"^(tcg|kvm)(,[^\x00-\x1f{}]+)?$")
    cpu: str = Field(pattern=r"^[^\x00-\x1f\x7f]+$")
    """CPU model and its flags, or `{parameter}`."""
    memory_mib: int | str
    """A number, or `{parameter}` of an integer parameter."""
    serial: bool = False
    """Append what the guest sends on its first serial port to `serial.log` of the instance."""
    arguments: tuple[str, ...] = Field(default=(), strict=False)
    parameters: Mapping[str, Parameter] = Field(default_factory=dict)
    environment: Mapping[
        Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")],
        Annotated[str, Field(pattern=r"^[^\x00]*$")],
    ] = Field(default_factory=dict)
    """Added to QEMU's otherwise nearly empty environment."""
    passthrough: PassthroughRules = PassthroughRules()
    """Whether requests may bring passthrough devices, and which."""

    @field_validator("machine")
    @classmethod
    def _is_versioned(cls, machine: str) -> str:
        kind, _, options = machine.partition(",")
        if not re.search(r"-[a-z]*\d+\.\d+", kind):
            raise ValueError(
                "is no versioned machine type, so it means another machine in each QEMU; "
                "write e.g. pc-q35-7.2 (`qemu-system-x86_64 -machine help` lists them)"
            )
        if re.search(r"(^|,)accel=", options):
            raise ValueError("names an accelerator; use the key `accelerator`")
        return machine

    @field_validator("memory_mib")
    @classmethod
    def _is_memory(cls, memory: int | str) -> int | str:
        if isinstance(memory, int) and memory < 1:
            raise ValueError("is no size of memory in MiB")
        if isinstance(memory, str) and not re.fullmatch(r"\{[^{}]+\}", memory):
            raise ValueError('is neither a number nor one "{parameter}"')
        return memory

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = list(template_problems(dict(self)))
        if problems:
            raise PydanticCustomError("profile", "parts do not fit", {"problems": problems})
        return self

    @cached_property
    def template(self) -> tuple[str | Argument, ...]:
        """`arguments`, parsed."""
        return tuple(command_line.parse(self.arguments)[0])

    @cached_property
    def cpu_template(self) -> Argument:
        return command_line.parse_cpu(self.cpu)

    def resolve(self, given: Mapping[str, Value], devices: Wanted = ()) -> "Resolved":
        """Fill the profile. Raises Invalid with every parameter that is wrong, and every device
        that may not be brought. Blocking."""
        values, violations = checked_values(self.name, self.parameters, given)
        resolved = Resolved(self, values, devices)
        violations += resolved.unfit()
        violations += refused_devices(self.name, self.passthrough, devices)
        if violations:
            text = "; ".join(f"{v.field}: {v.message}" for v in violations)
            raise Invalid(f"profile {self.name} cannot be used so: {text}", violations)
        return resolved


@dataclass(frozen=True)
class Resolved:
    """A profile with checked values."""

    profile: LaunchProfile
    values: Mapping[str, Value]
    devices: Wanted = ()
    """Passthrough devices, in attach order."""

    def argv(self) -> list[str]:
        """The command line, as far as the profile says: without monitors, name, -S, -incoming."""
        profile = self.profile
        return [
            profile.binary,
            *("-no-user-config", "-machine", profile.machine, "-accel", profile.accelerator),
            *("-cpu", self._fill(profile.cpu_template), "-m", f"{self.memory_kib}K"),
            *(p if isinstance(p, str) else self._fill(p) for p in profile.template),
        ]

    @property
    def memory_mib(self) -> int:
        memory = self.profile.memory_mib
        return memory if isinstance(memory, int) else int(self.values[memory[1:-1]])

    @property
    def memory_kib(self) -> int:
        """What QEMU is given; see the traps."""
        is_tcg = self.profile.accelerator.startswith("tcg")
        extra = is_tcg and "memory-backend=" not in self.profile.machine
        return self.memory_mib * 1024 + (TCG_EXTRA_KIB if extra else 0)

    def digest(self) -> str:
        """sha256 of what the guest can see; equal on both hosts, or the guest cannot move there.

        Blocking: reads firmware. Raises Invalid for firmware that cannot be read.
        """
        profile = self.profile
        machine: dict[str, object] = {
            "machine": profile.machine,
            "accelerator": profile.accelerator.partition(",")[0],
            "cpu": self._fill(profile.cpu_template),
            "memory_kib": self.memory_kib,
            "serial": profile.serial,
        }
        if self.devices:
            machine["passthrough"] = [visible_device(device) for device in self.devices]
        return launch_digest(machine, profile.template, self._visible)

    def unfit(self) -> list[Violation]:
        """Values that are right in themselves and cannot stand where the profile wants them."""
        violations: dict[str, Violation] = {}
        for part in (self.profile.cpu_template, *self.profile.template):
            for place in command_line.places(part):
                try:
                    if place.name in self.values:
                        self._render(place)
                except UnfitValue as error:
                    text = f"{self.values[place.name]!r} {error}"
                    field = f"parameters.{place.name}"
                    violations[field] = Violation(field, "not_allowed", text)
        return list(violations.values())

    def _fill(self, argument: Argument) -> str:
        return "".join(p if isinstance(p, str) else self._render(p) for p in argument.pieces)

    def _render(self, place: Placeholder) -> str:
        text = self.profile.parameters[place.name].render(self.values[place.name])
        return command_line.escape(text, place)

    def _visible(self, argument: Argument, place: Placeholder) -> str:
        """What the guest sees of a value."""
        parameter = self.profile.parameters[place.name]
        if not isinstance(parameter, PathParameter):
            return self._render(place)
        if parameter.same_content or argument.option in command_line.FIRMWARE:
            return content_digest(Path(str(self.values[place.name])), place.name)
        return "<path>"


def template_problems(profile: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) of all that cannot be seen in one key alone.

    Takes the keys of a profile as they were read: those of a wrong type are passed over, so that
    one mistake does not hide the next.
    """
    arguments = profile.get("arguments", ())
    is_list = isinstance(arguments, list | tuple) and all(isinstance(a, str) for a in arguments)
    texts: Sequence[str] = arguments if is_list else ()  # type: ignore[assignment]  # just tested
    parsed, problems = command_line.parse(texts)
    for index, problem in problems:
        yield f"arguments[{index}]", f"= {shown(texts[index])} {problem}"
    used = {place.name for part in parsed for place in command_line.places(part)}
    cpu = profile.get("cpu")
    if isinstance(cpu, str):
        try:
            used |= {place.name for place in command_line.places(command_line.parse_cpu(cpu))}
        except TemplateError as error:
            yield "cpu", f"= {shown(cpu)} {error}"
            problems.append((0, "cpu"))
    memory, parameters = profile.get("memory_mib"), profile.get("parameters", {})
    declared = parameters if isinstance(parameters, Mapping) else {}
    if isinstance(memory, str) and memory.startswith("{"):
        used.add(memory.strip("{}"))
        yield from _memory_problems(memory, declared.get(memory.strip("{}")))
    if profile.get("serial") is True and "-serial" in parsed:
        yield "serial", "= true, and the arguments have a -serial as well; leave one out"
    may_be_unused = bool(problems) or not is_list
    yield from name_problems(used, declared, look_for_unused=not may_be_unused)


def _memory_problems(memory: str, parameter: object) -> Iterator[tuple[str, str]]:
    kind = parameter.get("type") if isinstance(parameter, Mapping) else None
    if parameter is not None and kind != "integer" and not isinstance(parameter, IntegerParameter):
        yield "memory_mib", f"= {shown(memory)} names no integer parameter"
