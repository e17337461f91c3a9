"""Launch profiles: what a file may say, what a request may fill in, and what two hosts compare."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrd.errors import Invalid
from migrd.profiles.parameters import BadValue, IntegerParameter, PathParameter, StringParameter
from migrd.qemu.profile import LaunchProfile

SHIPPED = Path(__file__).parents[2] / "config" / "profiles"


def integer(**more: Any) -> dict[str, Any]:
    return {"type": "integer", "description": "a number", "min": 1, "max": 9, **more}


def text(**more: Any) -> dict[str, Any]:
    if "choices" not in more:
        more.setdefault("pattern", ".*")
    return {"type": "string", "description": "a text", **more}


def path(below: Path, **more: Any) -> dict[str, Any]:
    return {"type": "path", "description": "a file", "below": str(below), **more}


def profile(*arguments: str, parameters: Mapping[str, Any] = {}, **more: Any) -> LaunchProfile:
    fields = {
        "name": "test",
        "description": "for tests",
        "binary": "/usr/bin/qemu-system-x86_64",
        "machine": "pc-q35-7.2",
        "accelerator": "tcg",
        "cpu": "qemu64",
        "memory_mib": 64,
        "arguments": list(arguments),
        "parameters": parameters,
    }
    return LaunchProfile.model_validate({**fields, **more})


def refusals(of: LaunchProfile, **values: Any) -> dict[str, str]:
    """Field -> code of each violation."""
    with pytest.raises(Invalid) as refused:
        of.resolve(values)
    return {violation.field: violation.code for violation in refused.value.violations}


def read_options(argument: str) -> dict[str, str]:
    """QEMU's rule for `implied,key=value,...`, written a second time: a comma ends a value, and
    two of them are one within it."""
    found: dict[str, str] = {}
    rest = argument
    while rest:
        part, value_ended = "", False
        while rest and not value_ended:
            if rest.startswith(",,"):
                part, rest = part + ",", rest[2:]
            elif rest[0] == ",":
                rest, value_ended = rest[1:], True
            else:
                part, rest = part + rest[0], rest[1:]
        key, equals, value = part.partition("=")
        found[key if equals else "(implied)"] = value if equals else part
    return found


# Values


@given(st.text(st.characters(exclude_categories=("C", "Zl", "Zp", "Zs")), max_size=30))
@settings(deadline=None)
def test_no_value_can_add_an_option_or_a_property(value: str) -> None:
    made = profile("-device", "e1000,mac={a},id={b}", parameters={"a": text(), "b": text()})
    argv = made.resolve({"a": value, "b": "x," + value}).argv()
    assert argv[-2] == "-device"
    assert read_options(argv[-1]) == {"(implied)": "e1000", "mac": value, "id": "x," + value}
    assert len(argv) == len(made.resolve({"a": "", "b": ""}).argv())


@pytest.mark.parametrize("value", ["driver=e1000", "-qmp", "{'driver':'e1000'}", "-", "{"])
def test_a_value_that_would_be_read_as_an_option_a_key_or_json_is_refused(value: str) -> None:
    made = profile("-device", "{card},id=a", parameters={"card": text()})
    assert refusals(made, card=value) == {"parameters.card": "not_allowed"}


def test_a_cpu_value_cannot_add_a_flag_though_cpu_knows_no_escape() -> None:
    made = profile(cpu="{model}", parameters={"model": text()})
    assert refusals(made, model="qemu64,+vmx") == {"parameters.model": "not_allowed"}
    assert "qemu64" in made.resolve({"model": "qemu64"}).argv()


def test_options_that_take_their_argument_as_it_is_get_it_unescaped(tmp_path: Path) -> None:
    (tmp_path / "a,b=c.rom").write_bytes(b"x")
    made = profile("-bios", "{rom}", parameters={"rom": path(tmp_path)})
    assert made.resolve({"rom": "a,b=c.rom"}).argv()[-1] == f"{tmp_path}/a,b=c.rom"


@pytest.mark.parametrize("value", ["a\nb", "a\0b", "\x1b[2J", "a\x7f", "\ud800", "\u2028"])
def test_control_characters_never_reach_a_command_line(value: str) -> None:
    with pytest.raises(BadValue):
        StringParameter(type="string", description="x", pattern="(?s).*").check(value)


def test_booleans_are_written_as_qemu_writes_them_and_braces_can_be_meant() -> None:
    switch = {"type": "boolean", "description": "x", "default": False}
    made = profile("-device", "x,on={s},t={{}}", parameters={"s": switch})
    assert made.resolve({"s": True}).argv()[-1] == "x,on=on,t={}"
    assert made.resolve({}).argv()[-1] == "x,on=off,t={}"


def test_a_value_is_never_converted_and_all_wrong_ones_are_named_at_once(tmp_path: Path) -> None:
    parameters = {
        "n": integer(),
        "flag": {"type": "boolean", "description": "x"},
        "m": integer(),
        "word": text(choices=["a", "b"]),
        "disk": path(tmp_path),
        "needed": text(),
    }
    made = profile("-device", "x,a={n},b={flag},c={m},d={word},e={disk},f={needed}",
                   parameters=parameters)  # fmt: skip
    wrong: dict[str, Any] = {"n": "5", "flag": 1, "m": 10, "word": "c", "disk": "none", "odd": 1}
    assert refusals(made, **wrong) == {
        "parameters.n": "wrong_type",
        "parameters.flag": "wrong_type",
        "parameters.m": "out_of_range",
        "parameters.word": "not_allowed",
        "parameters.disk": "no_file",
        "parameters.needed": "missing_parameter",
        "parameters.odd": "unknown_parameter",
    }
    with pytest.raises(BadValue):
        IntegerParameter(type="integer", description="x", min=0, max=1).check(True)


# Paths


@pytest.mark.parametrize(
    "value", ["../secret", "/etc/passwd", "a/../../secret", "out", "dir/out", ".", ""]
)
def test_a_path_cannot_leave_its_directory(tmp_path: Path, value: str) -> None:
    below = tmp_path / "disks"
    (below / "dir").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (below / "out").symlink_to(tmp_path / "secret")
    (below / "dir" / "out").symlink_to("../../secret")
    parameter = PathParameter(type="path", description="x", below=str(below))
    with pytest.raises(BadValue) as refused:
        parameter.check(value)
    assert refused.value.code == "path_outside"


def test_a_path_may_be_a_link_within_its_directory_and_is_resolved(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("x")
    (tmp_path / "link").symlink_to("real")
    parameter = PathParameter(type="path", description="x", below=str(tmp_path))
    assert parameter.check("link") == os.path.realpath(tmp_path / "real")
    assert parameter.check(str(tmp_path / "link")) == os.path.realpath(tmp_path / "real")


@pytest.mark.parametrize(
    ("make", "value", "code"),
    [
        ("mkdir x", "x", "wrong_kind"),
        ("mkfifo x", "x", "wrong_kind"),
        ("true", "x", "no_file"),
        ("ln -s x x", "x", "no_file"),
        ("true", "x" * 300, "no_file"),
    ],
)
def test_a_path_must_lead_to_a_file(tmp_path: Path, make: str, value: str, code: str) -> None:
    subprocess.run(make.split(), cwd=tmp_path, check=True)
    with pytest.raises(BadValue) as refused:
        PathParameter(type="path", description="x", below=str(tmp_path)).check(value)
    assert refused.value.code == code


def test_a_directory_that_is_not_there_is_told_with_its_cure(tmp_path: Path) -> None:
    parameter = PathParameter(type="path", description="x", below=str(tmp_path / "none"))
    with pytest.raises(BadValue, match="is not there; create it") as refused:
        parameter.check("x")
    assert refused.value.code == "no_directory"


# The digest


def firmware_profile(tmp_path: Path, **more: Any) -> LaunchProfile:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "a.rom").write_bytes(b"one")
    arguments = ("-bios", "{rom}", "-drive", "file={disk},if=virtio", "-display", "none")
    return profile(
        *more.pop("arguments", arguments),
        parameters={"rom": path(tmp_path), "disk": path(tmp_path)},
        **more,
    )


VALUES = {"rom": "a.rom", "disk": "a.rom"}


def test_hosts_with_other_paths_binaries_and_back_ends_have_the_same_digest(
    tmp_path: Path,
) -> None:
    here = firmware_profile(tmp_path / "here")
    arguments = ("-bios", "{rom}", "-drive", "file={disk},if=virtio", "-vnc", "unix:/x")
    there = firmware_profile(
        tmp_path / "there", binary="/opt/qemu", accelerator="tcg,thread=single", arguments=arguments
    )
    assert here.resolve(VALUES).digest() == there.resolve(VALUES).digest()


@pytest.mark.parametrize(
    "more",
    [
        {"machine": "pc-q35-7.1"},
        {"memory_mib": 65},
        {"cpu": "Nehalem"},
        {"accelerator": "kvm"},
        {"serial": True},
        {"arguments": ("-bios", "{rom}", "-drive", "file={disk},if=ide")},
        {"arguments": ("-drive", "file={disk},if=virtio", "-bios", "{rom}")},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_a_guest_can_see_changes_the_digest(tmp_path: Path, more: dict[str, Any]) -> None:
    plain = firmware_profile(tmp_path).resolve(VALUES).digest()
    assert firmware_profile(tmp_path, **more).resolve(VALUES).digest() != plain


def test_other_bytes_of_the_firmware_change_the_digest_and_of_a_disk_do_not(tmp_path: Path) -> None:
    made = firmware_profile(tmp_path)
    (tmp_path / "disk").write_bytes(b"one")
    before = made.resolve({"rom": "a.rom", "disk": "disk"}).digest()
    (tmp_path / "disk").write_bytes(b"another")
    assert made.resolve({"rom": "a.rom", "disk": "disk"}).digest() == before
    (tmp_path / "a.rom").write_bytes(b"two")
    assert made.resolve({"rom": "a.rom", "disk": "disk"}).digest() != before


def test_a_firmware_that_the_profile_itself_names_is_compared_by_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"one")
    made = [profile("-bios", str(tmp_path / name)) for name in "ab"]
    assert made[0].resolve({}).digest() == made[1].resolve({}).digest()
    (tmp_path / "b").write_bytes(b"two")
    assert made[0].resolve({}).digest() != made[1].resolve({}).digest()
    (tmp_path / "b").unlink()
    with pytest.raises(Invalid, match="cannot be read"):
        made[1].resolve({}).digest()
