"""Launch profiles of the direct engine: what may be written, and what a request may fill in."""

import os
from pathlib import Path

import pytest

from migrd.core.facts import SpecDevice, VmSpec
from migrd.direct.profile import DirectProfile
from migrd.direct.profile_files import DirectProfiles, load_direct_profiles
from migrd.errors import ConfigError, Invalid, NotFound
from migrd.processes.spawn import RunAs
from migrd.qemu.profile_files import load_profiles

SHIPPED = Path(__file__).parents[2] / "config" / "profiles"
GOOD = """
engine = "direct"
description = "a guest"
kind = "thing-2"
command = ["/usr/bin/thing", "--size={size}", "{name}", "/srv/data", "{{plain}}"]
memory_mib = "{size}"
[parameters.size]
type = "integer"
description = "MiB"
min = 1
max = 64
[parameters.name]
type = "string"
description = "a word"
pattern = "[-a-z]+"
"""


def loaded(directory: Path, text: str = GOOD) -> DirectProfiles:
    (directory / "thing.toml").write_text(text)
    return load_direct_profiles(directory)


def refused(directory: Path, old: str, new: str) -> str:
    assert old in GOOD
    with pytest.raises(ConfigError) as error:
        loaded(directory, GOOD.replace(old, new))
    return error.value.message


def spec(**parameters: str | int | bool) -> VmSpec:
    return VmSpec("vm", "thing", parameters)


def test_a_request_fills_places_of_arguments_and_no_more(tmp_path: Path) -> None:
    resolved = loaded(tmp_path).resolve(spec(size=32, name="a-b"))
    assert resolved.argv() == ("/usr/bin/thing", "--size=32", "a-b", "/srv/data", "{plain}")
    assert resolved.memory_bytes == 32 << 20
    assert resolved.run_as is None


def test_no_value_can_become_an_option(tmp_path: Path) -> None:
    with pytest.raises(Invalid) as error:
        loaded(tmp_path).resolve(spec(size=32, name="--evil"))
    (violation,) = error.value.violations
    assert (violation.field, violation.code) == ("parameters.name", "not_allowed")


def test_everything_wrong_with_a_request_is_said_at_once(tmp_path: Path) -> None:
    device = SpecDevice("d", "0000:01:00.0")
    with pytest.raises(Invalid) as error:
        loaded(tmp_path).resolve(VmSpec("vm", "thing", {"size": 99, "no": 1}, (device,)))
    fields = {violation.field for violation in error.value.violations}
    assert fields == {"parameters.size", "parameters.no", "parameters.name", "devices"}
    with pytest.raises(NotFound, match="there are: thing"):
        loaded(tmp_path).resolve(VmSpec("vm", "other", {}))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"/usr/bin/thing"', '"thing"', "absolute path of a program"),
        ('"/usr/bin/thing"', '"/usr/{name}"', "which program runs is for the profile"),
        ("--size={size}", "--size={sizes}", "did you mean {size}"),
        ("--size={size}", "--size={", "single brace"),
        ('kind = "thing-2"', 'kind = "a thing"', "counter-1"),
        ('kind = "thing-2"\n', "", "kind is missing"),
        ('memory_mib = "{size}"', 'memory_mib = "{name}"', "no integer parameter"),
        ('memory_mib = "{size}"', "memory_mib = 0", "no size of memory"),
        ('engine = "direct"', 'engine = "drect"', '"qemu" or "direct"'),
        ('kind = "thing-2"', 'kind = "t"\nmachine = "pc"', "machine is no key"),
        ('kind = "thing-2"', 'kind = "t"\nenvironment = { MIGRD_VM = "x" }', "migrd's own"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_cure(
    tmp_path: Path, old: str, new: str, told: str
) -> None:
    assert told in refused(tmp_path, old, new)


def test_the_digest_is_of_what_the_guest_can_tell(tmp_path: Path) -> None:
    profiles = loaded(tmp_path)
    ours = profiles.resolve(spec(size=32, name="a")).digest()

    def other(old: str, new: str) -> str:
        assert old in GOOD
        return loaded(tmp_path, GOOD.replace(old, new)).resolve(spec(size=32, name="a")).digest()

    assert other("/usr/bin/thing", "/opt/thing") == ours
    assert other("/srv/data", "/elsewhere") == ours
    assert other("thing-2", "thing-3") != ours
    assert other("--size=", "--megs=") != ours
    assert profiles.resolve(spec(size=33, name="a")).digest() != ours
    assert profiles.resolve(spec(size=32, name="b")).digest() != ours


def test_whom_it_runs_as_is_found_out_or_refused(tmp_path: Path) -> None:
    asked = spec(size=1, name="a")
    with pytest.raises(Invalid, match="is not there; create it"):
        loaded(tmp_path, GOOD.replace('"thing-2"', '"t"\nuser = "nosuch"')).resolve(asked)
    profiles = loaded(tmp_path, GOOD.replace('"thing-2"', '"t"\nuser = "daemon"'))
    if os.geteuid() == 0:
        run_as = profiles.resolve(asked).run_as
        assert isinstance(run_as, RunAs)
        assert run_as.uid > 0
    else:
        with pytest.raises(Invalid, match="does not run as root"):
            profiles.resolve(asked)


def test_each_engine_reads_its_own_profiles_of_one_directory() -> None:
    direct, qemu = load_direct_profiles(SHIPPED).by_name, load_profiles(SHIPPED).by_name
    assert set(direct) == {"counter"}
    assert set(qemu) == {"lab", "linux"}
    assert isinstance(direct["counter"], DirectProfile)
    resolved = load_direct_profiles(SHIPPED).resolve(VmSpec("vm", "counter", {}))
    assert resolved.argv()[-2:] == ("64", "1000")
