"""The launch profiles of QEMUs: the files of `profiles_dir` that name no other engine.

Every problem of every file is told at once, with the file, the key, the value found and the cure.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import BaseModel

from migrd.core.facts import VmSpec
from migrd.core.vfio_launch import VfioLaunch
from migrd.errors import Invalid, NotFound, Violation
from migrd.profiles.files import ProfileFile, load_directory, read_file
from migrd.profiles.wording import validated
from migrd.qemu.allowance import PassthroughRules
from migrd.qemu.profile import LaunchProfile, Resolved, template_problems

SECTIONS: Final[Mapping[str, type[BaseModel]]] = {"passthrough": PassthroughRules}
PATTERN_CURES: Final[Mapping[str, str]] = {
    "binary": "should be the absolute path of a QEMU",
    "machine": "should be a versioned machine type, e.g. pc-q35-7.2",
    "accelerator": 'should be "kvm" or "tcg" (with its own options: "tcg,thread=single")',
    "parameters": "should be an absolute path",
}


@dataclass(frozen=True)
class Profiles:
    """All launch profiles of this host, by name."""

    by_name: Mapping[str, LaunchProfile] = field(default_factory=dict)
    directory: Path | None = None

    def find(self, name: str) -> LaunchProfile:
        """Raises NotFound, with the names there are."""
        if name in self.by_name:
            return self.by_name[name]
        known = ", ".join(sorted(self.by_name)) or "none"
        where = f" in {self.directory}" if self.directory is not None else ""
        raise NotFound(
            f"no launch profile {name!r}{where}; there are: {known}", code="unknown_profile"
        )

    def resolve(self, spec: VmSpec, devices: VfioLaunch | None = None) -> Resolved:
        """Fill the profile that a VM names; `devices`: as they are to be given to QEMU, where that
        is decided already. Blocking (looks at files).

        Raises NotFound for the profile, Invalid with every parameter that is wrong and every
        passthrough device that it does not allow.
        """
        if spec.profile is None:
            text = f"VM {spec.name} names no launch profile"
            raise Invalid(text, [Violation("profile", "no_launch_profile", text)])
        wanted = spec.devices if devices is None else devices.devices
        return self.find(spec.profile).resolve(spec.parameters, wanted)


def load_profiles(directory: Path) -> Profiles:
    """Read all profiles. Blocking. Raises ConfigError with every problem of every file."""
    return Profiles(load_directory(directory, "qemu", _load) or {}, directory)


def load_profile(path: Path) -> LaunchProfile:
    """Read one profile. Blocking. Raises ConfigError with every problem, one per line."""
    return _load(read_file(path))


def _load(file: ProfileFile) -> LaunchProfile:
    return validated(file, LaunchProfile, template_problems, PATTERN_CURES, SECTIONS)
