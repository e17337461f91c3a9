"""Unpacking packages: for real, with the smallest package there is, and with what can go wrong."""

import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.setup import debian
from tests.setup.debian import Bundle, SetUpError, unpacked

HELLO = Bundle(name="hello", packages=("hello",), program="usr/bin/hello")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def apt_state() -> dict[str, tuple[int, int]]:
    """All that installing, or adding a package source, would change on this machine."""
    seen = {}
    for top in ("/etc/apt", "/var/lib/apt/lists", "/var/lib/apt/extended_states"):
        for path in [Path(top), *Path(top).rglob("*")]:
            if path.exists():
                seen[str(path)] = (path.stat().st_mtime_ns, path.stat().st_size)
    status = Path("/var/lib/dpkg/status").stat()
    return {**seen, "dpkg": (status.st_mtime_ns, status.st_size)}


def test_a_package_is_unpacked_and_runs_and_the_machine_is_as_before() -> None:
    before = apt_state()
    program = unpacked(HELLO)
    done = subprocess.run([program, "--greeting=moin"], capture_output=True, text=True, check=True)
    assert done.stdout == "moin\n"
    assert apt_state() == before


def test_what_is_unpacked_is_used_again_and_mended_when_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = unpacked(HELLO)
    with monkeypatch.context() as patch:
        patch.setattr(debian, "_run", lambda *_, **__: pytest.fail("fetched again"))
        assert unpacked(HELLO) == program
    program.unlink()
    assert unpacked(HELLO) == program
    assert os.access(program, os.X_OK)


def test_files_to_read_are_unpacked_and_given_as_they_are() -> None:
    notice = "usr/share/doc/hello/copyright"
    bundle = Bundle(name="notice", packages=("hello",), program=notice, is_program=False)
    assert "GNU" in unpacked(bundle).read_text()


def test_a_package_that_does_not_exist_is_named() -> None:
    bundle = Bundle(name="none", packages=("migrd-nonesuch",), program="usr/bin/none")
    with pytest.raises(SetUpError, match="migrd-nonesuch"):
        unpacked(bundle)


def test_a_program_that_is_not_in_its_package_is_named() -> None:
    bundle = Bundle(name="hello", packages=("hello",), program="usr/bin/nonesuch")
    with pytest.raises(SetUpError, match="contain no usr/bin/nonesuch"):
        unpacked(bundle)


def test_a_program_that_does_not_run_is_an_error_and_not_a_skip() -> None:
    bundle = replace(HELLO, program="usr/share/doc/hello/copyright")
    with pytest.raises(SetUpError, match=r"does not run:\n.*denied"):
        unpacked(bundle)


def test_without_a_mirror_for_the_release_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "_run", lambda *_, **__: "")
    with pytest.raises(SetUpError, match="none of this machine's package sources"):
        unpacked(replace(HELLO, name="no-mirror"))


def test_another_distribution_is_told_how_to_name_the_programs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    release = tmp_path / "os-release"
    release.write_text('ID=fedora\nVERSION_CODENAME=""\n')
    monkeypatch.setattr(debian, "_OS_RELEASE", release)
    with pytest.raises(SetUpError, match="MIGRD_TEST_QEMU_10"):
        unpacked(replace(HELLO, name="elsewhere"))


def test_a_program_that_is_named_is_taken_and_must_be_executable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MIGRD_TEST_PROMTOOL", "/bin/true")
    assert debian.promtool() == Path("/bin/true")
    monkeypatch.setenv("MIGRD_TEST_PROMTOOL", str(tmp_path / "nonesuch"))
    with pytest.raises(SetUpError, match="no executable file"):
        debian.promtool()
