import subprocess
from pathlib import Path


def test_the_tools_of_the_tests_are_what_they_should_be(
    qemu_binaries: dict[str, Path], promtool: Path
) -> None:
    for label, binary in qemu_binaries.items():
        version = subprocess.run(
            [str(binary), "-version"], capture_output=True, text=True, check=True
        )
        assert f"version {label}." in version.stdout
    good = "# HELP a_total A.\n# TYPE a_total counter\na_total 1\n"
    check = [str(promtool), "check", "metrics"]
    assert subprocess.run(check, input=good, text=True, check=False).returncode == 0
    assert subprocess.run(check, input="a b c\n", text=True, check=False).returncode != 0
