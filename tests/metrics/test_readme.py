"""What README.md says of metrics and alerts is there: a name that is only there sends people off.

The names of the client library in C begin the same way; they are what its header declares.
"""

import re
from pathlib import Path

import migrd
from tests.metrics.test_rules import RULES, exposed_names

PACKAGE = Path(migrd.__file__).parent
README = PACKAGE.parent / "README.md"
C_HEADER = PACKAGE / "direct" / "include" / "migrd_direct.h"
_NAME = re.compile(r"\bmigrd_[a-z0-9_]+\b(?!\.[a-z])")
"""Without names of files."""
_ALERT = re.compile(r"\bMigrd[A-Z]\w+")


def metrics_in(text: str) -> set[str]:
    return set(_NAME.findall(text)) - set(_NAME.findall(C_HEADER.read_text()))


def alerts_in(text: str) -> set[str]:
    errors = re.findall(r"^class (Migrd\w+)", (PACKAGE / "errors.py").read_text(), re.MULTILINE)
    return set(_ALERT.findall(text)) - set(errors)


async def test_every_metric_that_the_readme_names_is_one_that_migrd_tells() -> None:
    named = metrics_in(README.read_text())
    assert {"migrd_arbiter_up", "migrd_migration_condition"} <= named
    assert named - await exposed_names() == set()


def test_every_alert_that_the_readme_names_is_in_the_rules() -> None:
    known = set(re.findall(r"- alert: (\w+)", RULES.read_text()))
    assert alerts_in(README.read_text()) - known == set()


def test_what_is_looked_for_is_found() -> None:
    assert metrics_in("`migrd_gone{vm=1}` and migrd_gone_too_total; not `migrd_direct.h`") == {
        "migrd_gone",
        "migrd_gone_too_total",
    }
    assert metrics_in("`migrd_start` of the C library, `migrd_client *client`") == set()
    assert alerts_in("`MigrdGone` fires; a `MigrdError` is raised by migrd") == {"MigrdGone"}
