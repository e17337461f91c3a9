"""Files of launch profiles: each is whole or refused, and a refusal names everything at once."""

from pathlib import Path

import pytest

from migrd.core.facts import VmSpec
from migrd.errors import ConfigError, Invalid, NotFound, Violation
from migrd.qemu.command_line import OURS
from migrd.qemu.profile import LaunchProfile
from migrd.qemu.profile_files import Profiles, load_profile, load_profiles
from tests.qemu.test_profile import profile

SHIPPED = Path(__file__).parents[2] / "config" / "profiles"


def written(directory: Path, text_: str, name: str = "bad.toml") -> str:
    """What the file is refused with."""
    (directory / name).write_text(text_)
    with pytest.raises(ConfigError) as refused:
        load_profile(directory / name)
    return str(refused.value)


GOOD = (SHIPPED / "lab.toml").read_text()


def test_a_refused_profile_names_every_problem_at_once(tmp_path: Path) -> None:
    told = written(
        tmp_path,
        """
        binary = "qemu"
        machine = "q35"
        accelerator = "hvf"
        cpu = "{nope"
        memory_mib = "lots"
        serail = true
        arguments = ["-qmp", "unix:/x", "-drive", "{a}=x,file={disc}", "-S", "-{a}", "x y"]
        [parameters.disk]
        type = "path"
        below = "x"
        [parameters.a]
        type = "int"
        [parameters.b]
        type = "string"
        description = "x"
        """,
    )
    for part in (
        "description is missing",
        "binary = 'qemu' should be the absolute path",
        "machine = 'q35' is no versioned machine type",
        "accelerator = 'hvf' should be",
        "memory_mib = 'lots' is neither a number",
        "serail is no key of a launch profile; did you mean serial?",
        "arguments[0] = '-qmp' is not for profiles",
        "arguments[3] = '{a}=x,file={disc}' {a} stands in the name of a key",
        "arguments[4] = '-S' is not for profiles: migrd decides when the guest runs",
        "arguments[5] = '-{a}' a placeholder may stand in a value only",
        "cpu = '{nope' has a brace",
        "parameters.disk.below = 'x' should be an absolute path",
        "parameters.disk.description is missing",
        'parameters.a.type should be "integer", "boolean", "string" or "path"',
        "needs either choices or a pattern",
    ):
        assert part in told, told
    assert told.count(f"{tmp_path}/bad.toml: ") == len(told.splitlines())


@pytest.mark.parametrize("option", sorted(OURS))
@pytest.mark.parametrize("dashes", ["-", "--"])
def test_a_profile_may_not_set_what_migrd_sets(option: str, dashes: str) -> None:
    with pytest.raises(ValueError, match="parts do not fit"):
        profile(f"{dashes}{option}", "x")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("-device", "x,{a}=1"), "name of a key"),
        (("-device", "x,{a}"), "name of a key"),
        (("-device", "{a}=1"), "name of a key"),
        (("-device", "x,,y={a},{a}"), "name of a key"),
        (("-device", "{{'driver':'{a}'}}"), "JSON"),
        (("x={a}",), "belongs to no option"),
        (("-nodefaults", "{a}"), "takes no value"),
        (("-smp 2",), "write option and value as two"),
        (("-chardev", "null,id=migrd-x,a={a}"), "migrd's own"),
        (("-device", "x,a={}"), "brace"),
        (("-device", "x,a={a"), "brace"),
        (("-device", "x,a={b}"), "is missing, but"),
        (("-nodefaults",), "is used nowhere"),
    ],
)
def test_a_template_that_would_open_a_door_is_refused(
    tmp_path: Path, arguments: tuple[str, ...], why: str
) -> None:
    listed = ", ".join(f'"{argument}"' for argument in arguments)
    head = GOOD.replace('    "-bios", "{firmware}",', f"    {listed},")
    head = head.partition("[parameters.firmware]")[0]
    rest = GOOD[GOOD.index("[parameters.memory_mib]") :]
    parameter = '[parameters.a]\ntype = "string"\ndescription = "x"\npattern = ".*"\n'
    assert why in written(tmp_path, head + parameter + rest)


@pytest.mark.parametrize(
    ("text_", "why"),
    [
        ("a = ", "not TOML"),
        ("\udcff", "not TOML"),
        ("a = 1\n" + "#" * 70_000, "is it a launch profile?"),
        (GOOD.replace('description = "Test', 'name = "other"\ndescription = "Test'), "that of"),
        (GOOD.replace("default = 64", "default = 8"), "the default does not keep the rules"),
        (GOOD.replace("min = 16\n", "min = 99999\n"), "is above max"),
        (GOOD.replace('"pc-i440fx-7.2"', '"pc-i440fx-7.2,accel=kvm"'), "names an accelerator"),
        (GOOD.replace('"{memory_mib}"', '"{firmware}"'), "names no integer parameter"),
        (GOOD.replace("serial = true", "serial = 1"), "serial = 1"),
        (GOOD.replace('"-display", "none"', '"-serial", "null"'), "a -serial as well"),
        (GOOD + '[environment]\n"A=B" = "x"\n', "environment.A=B"),
        (GOOD + '[environment]\nA = "\\u0000"\n', "environment.A"),
        (GOOD.replace('"qemu64"', '"a\\nb"'), "cpu = "),
        (GOOD + "colour = 1\n", "parameters.memory_mib.colour is no key"),
    ],
)
def test_a_file_that_is_not_right_is_refused_with_the_reason(
    tmp_path: Path, text_: str, why: str
) -> None:
    (tmp_path / "bad.toml").write_bytes(text_.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError) as refused:
        load_profile(tmp_path / "bad.toml")
    assert why in str(refused.value)
    assert f"{tmp_path}/bad.toml" in str(refused.value)


def test_all_files_are_told_of_and_a_file_that_everybody_may_write_is_refused(
    tmp_path: Path,
) -> None:
    (tmp_path / "one.toml").write_text("a = ")
    (tmp_path / "two.toml").write_text(GOOD)
    (tmp_path / "two.toml").chmod(0o666)
    (tmp_path / "BAD NAME.toml").write_text(GOOD)
    (tmp_path / "notes.txt").write_text("not looked at")
    with pytest.raises(ConfigError) as refused:
        load_profiles(tmp_path)
    told = str(refused.value)
    assert "one.toml: not TOML" in told
    assert "two.toml: everybody may write it" in told
    assert "BAD NAME.toml: the file's name is no name" in told
    assert len(told.splitlines()) == 3


def test_a_profile_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    profiles = load_profiles(SHIPPED)
    with pytest.raises(NotFound, match="there are: lab, linux") as missing:
        profiles.resolve(VmSpec("a", "windows"))
    assert missing.value.code == "unknown_profile"
    with pytest.raises(Invalid) as nameless:
        profiles.resolve(VmSpec("a", None))
    assert [v.code for v in nameless.value.violations] == ["no_launch_profile"]
    assert load_profiles(tmp_path / "none").by_name == {}
    assert Profiles().by_name == {}


def test_the_shipped_profiles_say_what_a_request_has_to_fill_in(tmp_path: Path) -> None:
    linux = load_profiles(SHIPPED).find("linux")
    missing = {
        v.field: v for v in _violations(linux) if v.code in ("missing_parameter", "no_directory")
    }
    assert set(missing) == {f"parameters.{name}" for name in ("memory_mib", "disk", "tap", "mac")}
    assert all(parameter.description for parameter in linux.parameters.values())


def _violations(of: LaunchProfile) -> tuple[Violation, ...]:
    with pytest.raises(Invalid) as refused:
        of.resolve({})
    return refused.value.violations
