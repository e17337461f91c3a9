"""Launch profiles of the direct engine: the files of `profiles_dir` with `engine = "direct"`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from migrd.core.facts import VmSpec
from migrd.direct.profile import DirectProfile, Resolved, template_problems
from migrd.errors import Invalid, NotFound, Violation
from migrd.profiles.files import ProfileFile, load_directory
from migrd.profiles.wording import validated

PATTERN_CURES: Final[Mapping[str, str]] = {
    "kind": "should be a word such as counter-1: letters, digits and . _ -",
    "user": "should be the name of a user",
    "parameters": "should be an absolute path",
}


@dataclass(frozen=True)
class DirectProfiles:
    """All of them, by name."""

    by_name: Mapping[str, DirectProfile] = field(default_factory=dict)
    directory: Path | None = None

    def resolve(self, spec: VmSpec) -> Resolved:
        """Fill the profile that a VM names. Blocking.

        Raises NotFound for the profile, Invalid with everything that is wrong.
        """
        if spec.profile is None:
            text = f"VM {spec.name} names no launch profile"
            raise Invalid(text, [Violation("profile", "no_launch_profile", text)])
        profile = self.by_name.get(spec.profile)
        if profile is None:
            known = ", ".join(sorted(self.by_name)) or "none"
            text = f"no launch profile {spec.profile!r} of the direct engine; there are: {known}"
            raise NotFound(text, code="unknown_profile")
        return profile.resolve(spec.parameters, spec.devices)


def load_direct_profiles(directory: Path) -> DirectProfiles:
    """Read all profiles. Blocking. Raises ConfigError with every problem of every file."""
    return DirectProfiles(load_directory(directory, "direct", _load) or {}, directory)


def _load(file: ProfileFile) -> DirectProfile:
    return validated(file, DirectProfile, template_problems, PATTERN_CURES)
