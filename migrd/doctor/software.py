"""Python, launch profiles, and the QEMUs and programs that they name."""

import asyncio
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from migrd.config import Settings, Tls
from migrd.core.facts import REQUIRED_FEATURES, Feature
from migrd.direct.profile import DirectProfile
from migrd.direct.profile_files import load_direct_profiles
from migrd.doctor.finding import Check, Finding, fail, ok, warn
from migrd.errors import ConfigError, VmmError
from migrd.qemu.probe import Prober
from migrd.qemu.profile import LaunchProfile
from migrd.qemu.profile_files import load_profiles

LEAST_PYTHON: Final = (3, 11)
_INSTALL: Final = (
    "apt-get install qemu-system-x86   (or: dnf install qemu-kvm)\n"
    "or mend `binary` in the launch profile"
)


def checks_of_any_host() -> list[Check]:
    """Those that need no configuration."""
    return [Check("python", blocking=look_at_python)]


def checks(settings: Settings) -> list[Check]:
    return [Check("launch profiles", blocking=partial(look_at_profiles, settings), deadline_s=60)]


def look_at_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Finding:
    said = f"{platform.python_implementation()} {'.'.join(map(str, version))} at {sys.executable}"
    if version < LEAST_PYTHON:
        least = ".".join(map(str, LEAST_PYTHON))
        return fail("python", said, f"install Python {least} or newer and migrd for it")
    return ok("python", said)


def look_at_profiles(settings: Settings) -> Iterable[Finding]:
    """Blocking. The profiles, then each QEMU and program that they name, once."""
    directory = settings.host.profiles_dir
    try:
        profiles = load_profiles(directory).by_name
        direct = load_direct_profiles(directory).by_name
    except ConfigError as error:
        cure = f"mend the files in {directory} and run this again"
        return [fail("launch profiles", error.message, cure)]
    if not profiles and not direct:
        message = f"none in {directory}: migrd can launch no VM, nor take one from another host"
        cure = f"put a launch profile there; see config/profiles/ for examples: {directory}/*.toml"
        return [warn("launch profiles", message, cure)]
    names = ", ".join(sorted([*profiles, *direct]))
    return [
        ok("launch profiles", f"{names} in {directory}"),
        *_look_at_programs(direct.values()),
        *asyncio.run(_look_at_qemus(profiles.values(), settings)),
    ]


def _look_at_programs(profiles: Iterable[DirectProfile]) -> Iterator[Finding]:
    """Of the direct engine: nothing is started."""
    for program in sorted({profile.command[0] for profile in profiles}):
        name = f"program {program}"
        if not Path(program).is_file() or not os.access(program, os.X_OK):
            message = "it is not there, or cannot be executed"
            yield fail(name, message, "install it, or mend `command` in the launch profile")
        else:
            yield ok(name, "can be executed")


async def _look_at_qemus(profiles: Iterable[LaunchProfile], settings: Settings) -> list[Finding]:
    prober = Prober()
    return [
        await _look_at_qemu(prober, binary, using, settings)
        for binary, using in _by_binary(profiles).items()
    ]


def _by_binary(profiles: Iterable[LaunchProfile]) -> dict[str, list[LaunchProfile]]:
    found: dict[str, list[LaunchProfile]] = {}
    for profile in profiles:
        found.setdefault(profile.binary, []).append(profile)
    return found


async def _look_at_qemu(
    prober: Prober, binary: str, using: list[LaunchProfile], settings: Settings
) -> Finding:
    name = f"qemu {binary}"
    profile = using[0]
    try:
        # tcg: whether KVM works is a question of its own, with an answer of its own
        probed = await prober.ask(binary, "tcg", profile.environment)
    except VmmError as error:
        return fail(name, error.message, _INSTALL)
    lacking = sorted(str(f) for f in REQUIRED_FEATURES - probed.features)
    if settings.migration.tls is Tls.REQUIRED and Feature.TLS not in probed.features:
        lacking.append(Feature.TLS)
    if lacking:
        message = f"{probed.version} lacks what migrd needs: {', '.join(lacking)}"
        return fail(name, message, "install QEMU 7.2 or newer, built with GnuTLS")
    missing = sorted(str(f) for f in set(Feature) - probed.features)
    users = ", ".join(sorted(p.name for p in using))
    without = f"; without {', '.join(missing)}" if missing else ""
    return ok(name, f"{probed.version}, for {users}{without}")
