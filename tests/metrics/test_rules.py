"""The alerts that come with migrd watch what migrd tells, in words that it uses."""

import re
import subprocess
from pathlib import Path

import migrd
from migrd.core.handover import DestinationPhase
from migrd.core.phases import Phase
from migrd.metrics import Exposition
from tests.metrics.test_recorder import busy

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "prometheus" / "migrd.rules.yml"
ENGINE = Path(migrd.__file__).parent / "engine"
ALARMS = "### Alarms"
"""The README's section with a row for each condition."""


async def _told() -> set[str]:
    """Names of all series that a daemon with an arbiter tells."""
    metrics, host = busy()
    arbiter = metrics.watch_arbiter()
    arbiter.requested("read", "ok", 0.001)
    body = (await Exposition(metrics, host).refresh()).body.decode()
    return {line.split("{")[0].split(" ")[0] for line in body.splitlines() if line[0] != "#"}


def _expressions() -> list[str]:
    return re.findall(r"^ *expr: (.*)$", RULES.read_text(), re.MULTILINE)


def test_promtool_takes_the_rules(promtool: Path) -> None:
    told = subprocess.run(
        [promtool, "check", "rules", RULES], capture_output=True, text=True, timeout=60
    )
    assert told.returncode == 0, told.stdout + told.stderr


async def test_every_metric_of_an_alert_is_one_that_migrd_tells() -> None:
    asked = {name for text in _expressions() for name in re.findall(r"\bmigrd_\w+", text)}
    assert len(asked) > 6
    assert asked - await _told() == set()


def test_every_phase_of_an_alert_is_one_that_there_is() -> None:
    known = {phase.value for phase in (*Phase, *DestinationPhase)}
    found = re.findall(r'(?:phase|outcome)=~?"([^"]*)"', " ".join(_expressions()))
    assert {word for text in found for word in text.split("|")} <= known


def test_every_alert_says_where_the_guest_is_and_what_to_do() -> None:
    text = RULES.read_text()
    alerts = text.count("- alert: ")
    assert alerts >= 10
    for part in (" summary: ", " where: ", " action: ", "severity: "):
        assert text.count(part) == alerts, part


FIRING = """\
rule_files: [{rules}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - series: 'migrd_ownership_violations_total{{instance="a"}}'
        values: '0 0 1 1'
      - series: 'migrd_migrations_total{{role="source",outcome="guest_lost",reason="vmm_died"}}'
        values: '_ _ 1 1'
      - series: 'migrd_migrations_active{{instance="a",role="source",phase="needs_operator"}}'
        values: '1 1 1 1'
      - series: 'migrd_arbiter_up{{instance="a"}}'
        values: '1 1 1 1'
    alert_rule_test:
{checks}
"""
CHECK = """\
      - {{eval_time: 3m, alertname: {name}, exp_alerts: [{expected}]}}
"""


def test_the_gravest_alerts_fire_at_the_first_event_and_no_other_does(
    promtool: Path, tmp_path: Path
) -> None:
    """A counter that appears with its first event has no increase, and is an alert all the same."""
    names = set(re.findall(r"- alert: (\w+)", RULES.read_text()))
    fires = {"MigrdGuestRanTwice", "MigrdGuestLost", "MigrdNeedsOperator"}
    assert fires <= names
    for name in sorted(names):
        told = _promtool_tests(promtool, tmp_path, CHECK.format(name=name, expected=""))
        assert (told.returncode != 0) is (name in fires), (name, told.stdout, told.stderr)


def _promtool_tests(
    promtool: Path, tmp_path: Path, checks: str
) -> "subprocess.CompletedProcess[str]":
    file = tmp_path / "firing.yml"
    file.write_text(FIRING.format(rules=RULES, checks=checks))
    return subprocess.run(
        [promtool, "test", "rules", file], capture_output=True, text=True, timeout=60
    )


# Conditions ---------------------------------------------------------------------------------------


def conditions() -> set[str]:
    """Every condition that a migration can show, found in the engine's code."""
    text = "".join(path.read_text() for path in ENGINE.glob("*.py"))
    named = re.findall(r"(?:trouble|_hold|Condition)\(\s*\"([A-Z]\w+)\"", text)
    held = re.findall(r"^(?:CONDITION|UNREACHABLE|ELSEWHERE)(?:: Final)? = \"(\w+)\"", text, re.M)
    return {*named, *held, "Refused", "NotGoingOn"}


def _named_in_readme(text: str) -> set[str]:
    return set(re.findall(r"`([A-Z][a-z]+(?:[A-Z][a-z]+)*)`", text))


def test_every_condition_that_the_operators_table_names_is_one_that_there_is() -> None:
    text = (ROOT / "README.md").read_text()
    start = text.index("### Where is my guest?")
    section = text[start : text.index("\n## ", start)].split("\n### Setting up")[0]
    assert _named_in_readme(section) <= conditions()
    if ALARMS in section:
        told = _named_in_readme(section.split(ALARMS)[1])
        assert conditions() - told == set(), "a condition without a row"


def test_the_search_for_conditions_finds_them() -> None:
    assert {
        "ArbiterUnreachable",
        "CancelRequested",
        "DestinationUnreachable",
        "GuestStopped",
        "JournalFailing",
        "LinkStalled",
        "OwnedElsewhere",
        "PostcopyFailed",
        "PostcopyPaused",
        "SourceUnclear",
    } <= conditions()
