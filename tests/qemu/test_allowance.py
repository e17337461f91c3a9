"""Which passthrough devices a profile lets a request bring, and how that is told."""

from pathlib import Path

import pytest

from migrd.core.facts import SpecDevice, VmSpec
from migrd.errors import ConfigError, Invalid
from migrd.qemu.allowance import PassthroughRules
from migrd.qemu.profile_files import Profiles, load_profile
from tests.qemu.hosts import LAB
from tests.qemu.test_profile import profile
from tests.qemu.vfio import FIRST, SECOND, device

UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


def codes(rules: dict[str, object], *devices: SpecDevice) -> list[tuple[str, str]]:
    profiles = Profiles({"test": profile(passthrough=rules)})
    try:
        profiles.resolve(VmSpec("vm", "test", devices=devices))
    except Invalid as refused:
        return [(violation.field, violation.code) for violation in refused.violations]
    return []


def test_a_profile_that_says_nothing_allows_no_device() -> None:
    wanted = SpecDevice("hostdev0", FIRST)
    assert codes({}, wanted) == [("devices", "passthrough_forbidden")]
    assert codes({"allowed": False}, wanted) == [("devices", "passthrough_forbidden")]
    assert codes({}) == []


@pytest.mark.parametrize(
    ("address", "pattern", "is_allowed"),
    [
        (FIRST, FIRST, True),
        (FIRST, "0000:41:*", True),
        (FIRST, "0000:42:*", False),
        (UUID, "83B8F4F2-*", True),
        (FIRST, "0000:41:00", False),
        ("0000:41:00.10", "0000:41:00.?", False),
    ],
)
def test_addresses_are_named_or_matched(address: str, pattern: str, is_allowed: bool) -> None:
    rules = PassthroughRules(allowed=True, addresses=(pattern,))
    assert rules.permits(address) is is_allowed


def test_every_device_that_is_wrong_is_told_at_once() -> None:
    found = codes(
        {"allowed": True, "addresses": [FIRST]},
        SpecDevice("hostdev0", FIRST),
        SpecDevice("hostdev1", SECOND),
        SpecDevice("no,id", FIRST),
        SpecDevice("migrd-serial", FIRST),
        SpecDevice("hostdev0", FIRST),
    )
    assert found == [
        ("devices[1].address", "device_not_allowed"),
        ("devices[2].id", "bad_device_id"),
        ("devices[3].id", "bad_device_id"),
        ("devices[4].id", "duplicate_device_id"),
    ]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ('addresses = ["0000:41:00.1"]', "add allowed = true"),
        ('allowed = "yes"', r"passthrough\.allowed"),
        ("alowed = true", "did you mean allowed"),
        ('allowed = true\naddresses = ["/etc/passwd"]', r"passthrough\.addresses\[0\]"),
    ],
)
def test_a_table_that_is_not_right_is_refused_with_the_cure(
    tmp_path: Path, table: str, words: str
) -> None:
    path = tmp_path / "odd.toml"
    path.write_text(f"{LAB.read_text()}\n[passthrough]\n{table}\n")
    with pytest.raises(ConfigError, match=words):
        load_profile(path)


def test_the_digest_of_a_spec_is_that_of_the_plan_made_for_it() -> None:
    allowing = profile(passthrough={"allowed": True})
    asked = allowing.resolve({}, (SpecDevice("hostdev0", FIRST),)).digest()
    planned = allowing.resolve({}, (device(address=SECOND),)).digest()
    assert asked == planned  # neither the host's address nor how QEMU treats it is seen
    elsewhere = SpecDevice("hostdev0", FIRST, guest_address="05.0")
    assert allowing.resolve({}, (elsewhere,)).digest() != asked
    assert profile().resolve({}).digest() == allowing.resolve({}).digest()
