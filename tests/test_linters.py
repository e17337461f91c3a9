"""The tools that judge the code, run as tests, and the budgets that no tool knows.

A function has at most 40 lines, a module 400 (250 in migrd/core). A module that must be longer
says so in its docstring, in a sentence with the words "longer than" and the reason.
Each exemption from a tool gives its reason on the same line:

    something()  # noqa: E501 - the reason
    something()  # type: ignore[code]  # the reason
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for top in ("migrd", "tests") for path in (ROOT / top).rglob("*.py"))
LOCKS = [ROOT / "requirements.lock", ROOT / "requirements-dev.lock"]
SCRIPTS = sorted(
    path
    for top in (".ci", "deploy", "tests")
    for path in (ROOT / top).rglob("*")
    if path.is_file() and path.read_bytes().startswith(b"#!")
)
FUNCTION_LINES = 40
MODULE_LINES = 400
CORE_MODULE_LINES = 250

EXEMPTION = re.compile(r"#\s*(noqa|type:\s*ignore)")
REASONED = (
    re.compile(r"# noqa: [A-Z]+[0-9]+(, [A-Z]+[0-9]+)* - \S.*"),
    re.compile(r"# type: ignore\[[a-z, -]+\]  # \S.*"),
)


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def test_ruff_finds_nothing() -> None:
    run(tool("ruff"), "check", ".")


def test_the_code_is_formatted() -> None:
    run(tool("ruff"), "format", "--check", ".")


@pytest.mark.timeout(600)  # the first time, without a cache
def test_mypy_strict_finds_nothing() -> None:
    run(tool("mypy"), "migrd", "tests")


def test_imports_go_the_right_way() -> None:
    run(tool("lint-imports"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_script_is_plain_shell(script: Path) -> None:
    assert script.read_text().startswith("#!/bin/sh\n")
    run("sh", "-n", str(script))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_no_function_is_longer_than_its_budget() -> None:
    too_long = [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}: {lines} lines"
        for path in SOURCES
        for function in functions(ast.parse(path.read_text()))
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > FUNCTION_LINES
    ]
    assert not too_long, "\n".join(too_long)


def test_no_module_is_longer_than_its_budget_without_saying_why() -> None:
    too_long = []
    for path in SOURCES:
        text = path.read_text()
        is_core = path.is_relative_to(ROOT / "migrd" / "core")
        budget = CORE_MODULE_LINES if is_core else MODULE_LINES
        lines = text.count("\n")
        docstring = ast.get_docstring(ast.parse(text)) or ""
        if lines > budget and "longer than" not in docstring.lower():
            too_long.append(f"{path.relative_to(ROOT)}: {lines} lines of {budget}")
    assert not too_long, "\n".join(too_long)


def unreasoned(text: str) -> Iterator[int]:
    """Numbers of the lines with an exemption that gives no reason."""
    for number, line in enumerate(text.splitlines(), start=1):
        if EXEMPTION.search(line) and not any(form.search(line) for form in REASONED):
            yield number


def test_each_exemption_gives_its_reason() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in SOURCES
        if path != Path(__file__)
        for number in unreasoned(path.read_text())
    ]
    assert not found, "\n".join(found)


def test_an_exemption_without_a_reason_is_found() -> None:
    planted = "a = 1  # noqa: E501\nb = 1  # type: ignore[misc]\nc = 1  # noqa: E501 - it is long\n"
    assert list(unreasoned(planted)) == [1, 2]


# ------------------------------------------------------------------------------- lock files

LOCK_LINE = re.compile(
    r"""
      [#]\ .*                                     # our own header
    | [a-z0-9][a-z0-9.-]*==[^\s;]+([ ];[ ].+)?[ ]\\   # a pin
    | [ ]{4}--hash=sha256:[0-9a-f]{64}([ ]\\)?
    | [ ]{4}[#](\ .*)?                            # why it is here
    |
    """,
    re.VERBOSE,
)
PLACES = re.compile(r"://|\.(com|org|net|io|dev)\b|^\s*-|/(root|home|opt|tmp|work|usr)\b")


def pins(lock: Path) -> dict[str, str]:
    found = re.findall(r"^([a-z0-9.-]+)==([^\s;]+)", lock.read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_a_lock_pins_everything_by_hash_and_names_no_host_or_path(lock: Path) -> None:
    lines = lock.read_text().splitlines()
    strange = [line for line in lines if not LOCK_LINE.fullmatch(line)]
    assert not strange
    assert not [line for line in lines if not line.startswith("    -") and PLACES.search(line)]
    blocks = re.split(r"\n(?=[a-z0-9][a-z0-9.-]*==)", lock.read_text())[1:]
    assert len(blocks) == len(pins(lock)) > 20
    assert all("--hash=sha256:" in block for block in blocks)


def test_the_locks_agree_with_each_other_and_with_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    run_pins, dev_pins = pins(LOCKS[0]), pins(LOCKS[1])
    both = run_pins.keys() & dev_pins.keys()
    assert {name: run_pins[name] for name in both} == {name: dev_pins[name] for name in both}
    needed = [
        *((text, run_pins) for text in project["project"]["dependencies"]),
        *((text, run_pins) for text in project["project"]["optional-dependencies"]["demo"]),
        *((text, run_pins) for text in project["build-system"]["requires"]),
        *((text, run_pins | dev_pins) for text in project["dependency-groups"]["dev"]),
    ]
    for text, known in needed:
        requirement = Requirement(text)
        version = known.get(canonicalize_name(requirement.name))
        assert version is not None, f"{text} is in no lock: sh tests/setup/lock"
        assert version in requirement.specifier, f"{text} is pinned to {version}"
