"""Tests with a QEMU stay on one worker, the lab's on another: none lies where nobody looks."""

import ast
from pathlib import Path

import pytest

from tests.setup.scheduling import DIRECT, LAB, ONE_AT_A_TIME, OneQemuAtATime

ROOT = Path(__file__).parent.parent.parent
ALONE = {"qemu_binaries", "qemu_binary"}


def test_every_test_with_a_qemu_or_a_network_of_its_own_is_where_one_worker_runs_them() -> None:
    elsewhere = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if not str(path.relative_to(ROOT)).startswith((*ONE_AT_A_TIME, LAB)) and _is_alone(path)
    ]
    assert not elsewhere


@pytest.mark.parametrize(
    ("test", "scope"),
    [
        ("tests/integration/test_kills.py::test_one", "qemu"),
        ("tests/integration/test_direct_moving.py::test_one[7.2]", DIRECT),
        ("tests/lab/guest/mock/test_boot_mock.py::test_one", LAB),
        ("tests/core/test_phases.py::test_one", "tests/core/test_phases.py::test_one"),
    ],
)
def test_what_runs_one_after_the_other_is_one_scope(test: str, scope: str) -> None:
    scheduler: OneQemuAtATime = object.__new__(OneQemuAtATime)
    assert scheduler._split_scope(test) == scope


def _is_alone(path: Path) -> bool:
    """It asks for a QEMU, or marks itself `real` or `netns`."""
    tree = ast.parse(path.read_text())
    asked = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    marks = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("pytest.mark")
    }
    return bool(asked & ALONE or marks & {"real", "netns"})
