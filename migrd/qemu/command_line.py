"""QEMU's command line: which parts of it a profile may write, and how a value is put in.

    profile   "-drive"  "file={disk},if=virtio"        template: text and placeholders
    value     disk = /srv/a,b.img                      typed and checked (migrd.qemu.profile)
    argv      "-drive"  "file=/srv/a,,b.img,if=virtio"

No shell is ever involved, so what could be smuggled in is limited to QEMU's own syntax:
- `key=value,key=value`: a comma ends a value, and is written twice to mean itself;
- where a value may stand without its key (`-device virtio-net-pci`), a `=` in it would make it a
  key of its own: refused there;
- an argument that begins with `-` may be read as an option, one that begins with `{` as JSON:
  refused where a placeholder stands first;
- a few options take their argument as it is (`-bios`, `-append`): nothing is doubled there;
- `-cpu` splits at each comma and knows no doubling: commas are refused (the profile's `cpu`).

Rules for profiles: each argument is an option or the value of the option before it; placeholders
stand in values only, never in the name of an option or of a key; options that migrd sets itself are
refused, and so is what would undo them (`-readconfig`, `-preconfig`, `-loadvm`).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

OURS: Final[Mapping[str, str]] = {
    "qmp": "migrd opens two monitors of its own",
    "qmp-pretty": "migrd opens two monitors of its own",
    "mon": "migrd opens two monitors of its own",
    "monitor": "migrd opens two monitors of its own; for a person's use `migrd` is there",
    "incoming": "migrd sets it where a guest is to arrive",
    "S": "migrd decides when the guest runs",
    "preconfig": "migrd decides when the machine is built",
    "loadvm": "a guest arrives by migration, or boots",
    "pidfile": "migrd knows the process by itself",
    "daemonize": "migrd detaches QEMU itself",
    "name": "migrd names the guest after the VM",
    "machine": "use the key `machine` of the profile",
    "M": "use the key `machine` of the profile",
    "accel": "use the key `accelerator` of the profile",
    "enable-kvm": 'use the key `accelerator` of the profile: accelerator = "kvm"',
    "no-kvm": 'use the key `accelerator` of the profile: accelerator = "tcg"',
    "cpu": "use the key `cpu` of the profile",
    "m": "use the key `memory_mib` of the profile",
    "nographic": 'it opens a monitor of its own; write "-display", "none" and serial = true',
    "readconfig": "what it reads cannot be checked; write its contents as arguments",
    "writeconfig": "it starts nothing",
    "no-user-config": "migrd sets it: no other file may change what a profile says",
    "h": "it starts nothing",
    "help": "it starts nothing",
    "version": "it starts nothing",
}
FLAGS: Final = frozenset(
    [
        "nodefaults",
        "snapshot",
        "no-reboot",
        "no-shutdown",
        "no-acpi",
        "no-hpet",
        "no-fd-bootchk",
        "full-screen",
        "win2k-hack",
        "only-migratable",
        "mem-prealloc",
        "singlestep",
        "one-insn-per-tb",
        "s",
    ]
)
"""Options without an argument: what stood behind them would be taken for a disk image."""
FIRMWARE: Final = frozenset(("bios", "kernel", "initrd", "dtb", "pflash"))
"""Their files become part of the guest's memory: both hosts need the same bytes."""
AS_IT_IS: Final = FIRMWARE | frozenset(
    [
        "append",
        "hda",
        "hdb",
        "hdc",
        "hdd",
        "cdrom",
        "fda",
        "fdb",
        "mtdblock",
        "sd",
        "L",
        "D",
        "d",
        "uuid",
        "k",
    ]
)
OWN_ID: Final = "migrd-"
"""Beginning of the ids of what migrd adds itself."""

_PLACEHOLDER: Final = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True)
class Placeholder:
    """`{name}` in a value."""

    name: str
    is_first: bool
    """The argument begins with it."""
    is_implied: bool
    """It stands where a `=` in its value would begin a key."""
    is_raw: bool
    """The option takes its argument as it is."""
    is_cpu: bool = False
    """It stands in `-cpu`, which splits at commas and lets none be escaped."""


@dataclass(frozen=True)
class Argument:
    """One value, in pieces, and the option it belongs to."""

    option: str
    pieces: tuple[str | Placeholder, ...]


class TemplateError(ValueError):
    """An argument of a profile that is not right; the text says how to mend it."""


class UnfitValue(ValueError):
    """A value that cannot stand where the profile wants it."""


def parse(arguments: Sequence[str]) -> tuple[list[str | Argument], list[tuple[int, str]]]:
    """Options (text) and values (Argument) in order, and (index, problem) of those not right."""
    parsed: list[str | Argument] = []
    problems: list[tuple[int, str]] = []
    option = ""
    for index, text in enumerate(arguments):
        try:
            if text.startswith("-"):
                option = _option(text)
                parsed.append(f"-{option}")
            else:
                parsed.append(_value(option, text))
                option = ""
        except TemplateError as problem:
            problems.append((index, str(problem)))
            option = text.strip("-") if text.startswith("-") else ""  # its value is no problem more
    return parsed, problems


def _option(text: str) -> str:
    name = text[2:] if text.startswith("--") else text[1:]
    if "{" in name or "}" in name:
        raise TemplateError("a placeholder may stand in a value only, not in an option's name")
    if "=" in name or not name or " " in name:
        raise TemplateError('is no option; write option and value as two: "-smp", "2"')
    if name in OURS:
        raise TemplateError(f"is not for profiles: {OURS[name]}")
    return name


def _value(option: str, text: str) -> Argument:
    if not option:
        raise TemplateError("belongs to no option: each value stands right behind its option")
    if option in FLAGS:
        raise TemplateError(f"stands behind -{option}, which takes no value")
    if any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise TemplateError("has a control character in it")
    argument = Argument(option, tuple(split(text, is_raw=option in AS_IT_IS)))
    first = argument.pieces[0] if argument.pieces else ""
    if isinstance(first, str) and first.startswith("{"):
        raise TemplateError("is in JSON form; write it as key=value,key=value")
    if isinstance(first, str) and re.search(rf"(^|,)id={OWN_ID}", first):
        raise TemplateError(f"ids that begin with {OWN_ID} are migrd's own")
    return argument


def split(text: str, *, is_raw: bool) -> Iterator[str | Placeholder]:
    """The pieces of a template; neighbouring text is one piece.

    Raises TemplateError for braces that do not match, or a placeholder in the name of a key.
    """
    plain, end = "", 0
    seen = ""  # the text so far, with a mark for each placeholder
    for match in _PLACEHOLDER.finditer(text):
        plain += text[end : match.start()]
        end = match.end()
        if match[0] in ("{{", "}}"):
            plain += match[0][0]
            continue
        if not match[1]:
            raise TemplateError('has a brace that names no parameter; write "{{" to mean "{"')
        if plain:
            yield plain
        seen, plain = seen + plain, ""
        yield _place(match[1], seen, text[end:], is_raw)
        seen += "\0"
    plain += text[end:]
    if plain:
        yield plain


def _place(name: str, before: str, after: str, is_raw: bool) -> Placeholder:
    unescaped = before.replace(",,", "\0\0")  # left to right, as QEMU reads it
    segment = unescaped.rsplit(",", 1)[-1]
    has_key = "=" in segment
    is_first_segment = segment == unescaped
    rest_of_segment = after.split(",", 1)[0]
    if not is_raw and not has_key and (not is_first_segment or "=" in rest_of_segment):
        raise TemplateError(f"{{{name}}} stands in the name of a key; only values can be filled in")
    return Placeholder(name, not before, not has_key and not is_raw, is_raw)


def parse_cpu(text: str) -> Argument:
    """The profile's `cpu`. Raises TemplateError."""
    pieces = tuple(split(text, is_raw=True))
    return Argument(
        "cpu", tuple(p if isinstance(p, str) else replace(p, is_cpu=True) for p in pieces)
    )


def places(part: str | Argument) -> Iterator[Placeholder]:
    """The placeholders in one part of a command line."""
    if isinstance(part, Argument):
        yield from (piece for piece in part.pieces if isinstance(piece, Placeholder))


def escape(text: str, place: Placeholder) -> str:
    """A value as QEMU reads it at this place. Raises UnfitValue where nothing can make it fit."""
    if place.is_first and text[:1] in ("-", "{"):
        raise UnfitValue(f"may not begin with {text[0]!r} here: QEMU would take it for an option")
    if place.is_cpu and "," in text:
        raise UnfitValue("may have no ',' in it here: -cpu would take it for a flag")
    if place.is_raw:
        return text
    if place.is_implied and "=" in text:
        raise UnfitValue("may have no '=' in it here: QEMU would take it for a key")
    return text.replace(",", ",,")
