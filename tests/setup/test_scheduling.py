"""Tests with a QEMU stay on one worker: none lies where the scheduler does not look."""

import ast
from pathlib import Path

from tests.setup.scheduling import ONE_AT_A_TIME

ROOT = Path(__file__).parent.parent.parent
ALONE = {"qemu_binaries", "qemu_binary"}


def test_every_test_with_a_qemu_or_a_network_of_its_own_is_where_one_worker_runs_them() -> None:
    elsewhere = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if not str(path.relative_to(ROOT)).startswith(ONE_AT_A_TIME) and _is_alone(path)
    ]
    assert not elsewhere


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
