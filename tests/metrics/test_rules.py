"""The alerts that come with migrd watch what migrd tells, in words that it uses."""

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

import migrd
from migrd.cli import story
from migrd.cli.main import build
from migrd.core.handover import DestinationPhase
from migrd.core.phases import Phase
from migrd.metrics import Exposition
from migrd.metrics.labels import OTHER
from tests.metrics.test_recorder import busy

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "prometheus" / "migrd.rules.yml"
ENGINE = Path(migrd.__file__).parent / "engine"
ALARMS = "### Alarms"
"""The README's section with a row for each condition."""


async def exposed_names() -> set[str]:
    """Names of all series that a daemon with an arbiter tells, and of their families."""
    metrics, host = busy()
    arbiter = metrics.watch_arbiter()
    arbiter.requested("read", "ok", 0.001)
    body = (await Exposition(metrics, host).refresh()).body.decode()
    families = set(re.findall(r"^# TYPE (\w+) ", body, re.MULTILINE))
    return families | {re.split(r"[{ ]", line)[0] for line in body.splitlines() if line[0] != "#"}


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
    assert asked - await exposed_names() == set()


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


def test_a_text_uses_only_labels_that_its_alert_has() -> None:
    """Prometheus puts nothing in the place of any other, and nobody would know which host."""
    for alert in re.split(r"- alert: ", RULES.read_text())[1:]:
        name, expression = alert.split("\n")[0], re.findall(r"expr: (.*)", alert)[0]
        used = set(re.findall(r"\$labels\.(\w+)", alert))
        assert "instance" in used, name
        kept = re.search(r"by \(([^)]*)\)", expression)
        if kept is not None:
            assert used <= set(re.split(r",\s*", kept[1])), name
    assert "by (instance, role, condition)" in RULES.read_text()


def test_every_command_of_an_alert_is_one_that_migrd_has() -> None:
    actions = " ".join(re.findall(r"^ *action: (.*)$", RULES.read_text(), re.MULTILINE))
    told = set(re.findall(r"\bmigrd (\w+)", actions)) - {"keeps", "must", "on"}  # sentences
    assert {"migrations", "host", "doctor", "start"} == told
    commands = build().commands
    assert told - {"doctor"} <= commands.keys()  # __main__ puts that in
    assert isinstance(commands["migrations"], click.Group)
    assert set(re.findall(r"migrd migrations (\w+) ID", actions)) <= set(
        commands["migrations"].commands
    )


def test_what_an_alert_quotes_of_the_command_line_stands_there() -> None:
    quoted = set(re.findall(r"'([a-z ]+)'", RULES.read_text()))
    assert {"do now", "why"} == quoted
    shown = Path(story.__file__).read_text()
    assert all(f'(("{words}", ' in shown for words in quoted)


@dataclass(frozen=True)
class Case:
    """What is scraped each minute, and which alerts stand after some minutes."""

    series: Mapping[str, str]
    fires: frozenset[str]
    after_min: int = 5


def _case(fires: str, after_min: int = 5, /, **series: str) -> Case:
    """Series by a short name (`_SHORT`)."""
    return Case({_SHORT[k]: v for k, v in series.items()}, frozenset(fires.split()), after_min)


_ENDED = 'migrd_migrations_total{role="source",outcome='
_CONDITION = "migrd_migration_condition{role="
_SHORT = {
    "violations": "migrd_ownership_violations_total",
    "violation": f'{_CONDITION}"source",condition="OwnershipViolation"}}',
    "lost": f'{_ENDED}"guest_lost",reason="vmm_died"}}',
    "given_up": f'{_ENDED}"guest_lost",reason="operator_guest_lost"}}',
    "shut_down": f'{_ENDED}"guest_lost",reason="guest_shut_down"}}',
    "left_behind": f'{_ENDED}"succeeded",reason="source_left_behind"}}',
    "done": f'{_ENDED}"succeeded",reason="none"}}',
    "needs_operator": 'migrd_migrations_active{role="source",phase="needs_operator"}',
    "granted": 'migrd_migrations_active{role="source",phase="granted"}',
    "starting": 'migrd_migrations_active{role="destination",phase="starting"}',
    "completing": 'migrd_migrations_active{role="source",phase="completing"}',
    "paused": f'{_CONDITION}"source",condition="PostcopyPaused"}}',
    "failed": f'{_CONDITION}"source",condition="PostcopyFailed"}}',
    "stalled": f'{_CONDITION}"source",condition="LinkStalled"}}',
    "unreachable": f'{_CONDITION}"source",condition="DestinationUnreachable"}}',
    "not_going_on": f'{_CONDITION}"destination",condition="NotGoingOn"}}',
    "unheard_of": f'{_CONDITION}"source",condition="other"}}',
    "cancelling": f'{_CONDITION}"source",condition="CancelRequested"}}',
    "stopped": f'{_CONDITION}"source",condition="GuestStopped"}}',
    "refused": f'{_CONDITION}"destination",condition="Refused"}}',
    "journal_failing": f'{_CONDITION}"source",condition="JournalFailing"}}',
    "ready_journal": 'migrd_ready{check="journal"}',
    "ready_arbiter": 'migrd_ready{check="arbiter"}',
    "arbiter_up": "migrd_arbiter_up",
}

CASES = {
    "nothing is wrong": _case(
        "", violations="0x9", needs_operator="0x9", granted="0x9", paused="0x9", failed="0x9",
        stalled="0x9", ready_journal="1x9", ready_arbiter="1x9", arbiter_up="1x9", done="1+1x9",
    ),
    "ran twice": _case("MigrdGuestRanTwice", 3, violations="0 0 1 1"),
    "ran twice, with the first scrape": _case("MigrdGuestRanTwice", 3, violations="_ _ 1 1"),
    "ran twice, and its daemon began anew": _case("MigrdGuestRanTwice", 0, violation="1"),
    "lost": _case("MigrdGuestLost", 3, lost="_ _ 1 1"),
    "given up": _case("MigrdGuestLost", 3, given_up="_ _ 1 1"),
    "shut itself down": _case("MigrdGuestShutDown", 3, shut_down="_ _ 1 1"),
    "another one shut itself down": _case("MigrdGuestShutDown", 30, shut_down="1x25 2x9"),
    "lost long ago": _case("", 30, lost="1x30", shut_down="1x30", left_behind="1x30"),
    "needs an operator": _case("MigrdNeedsOperator", 3, needs_operator="1x9"),
    "a handover stands": _case("MigrdHandoverStuck", 3, granted="1x9"),
    "a start stands": _case("MigrdHandoverStuck", 3, starting="1x9"),
    "handovers that go on": _case("", 5, granted="0 1 0 1 0 1 0", starting="1 0 1 0 1 0 1"),
    "postcopy pauses": _case("MigrdPostcopyPaused", 3, completing="1x9", paused="0 1x9"),
    "postcopy pauses for long": _case(
        "MigrdPostcopyPaused MigrdCompletingStuck", 8, completing="1x9", paused="1x9"
    ),
    "a pause that is soon mended": _case("", 3, completing="1x9", paused="0 0 1 0"),
    "postcopy fails": _case("MigrdPostcopyFailed", 1, completing="1x9", failed="0 1x9"),
    "an old process stays": _case("MigrdOldProcessLeft", 3, left_behind="_ _ 1 1"),
    "a link stalls": _case("MigrdMigrationHindered", 4, stalled="0 1x9"),
    "links stall in turn": _case("", 5, stalled="0 1 0 1 0 1 0"),
    "its destination is away": _case("MigrdMigrationHindered", 4, unreachable="2x9"),
    "its source is silent": _case("MigrdMigrationHindered", 4, not_going_on="1x9"),
    "hindered by what is unheard of": _case("MigrdMigrationHindered", 4, unheard_of="1x9"),
    "hindered, but not for long": _case("", 2, stalled="0 1 1 1", not_going_on="0 1 1 1"),
    "as somebody wished": _case("", 8, cancelling="1x9", stopped="1x9", refused="1x9"),
    "the journal fails": _case("MigrdNotReady", 4, ready_journal="0x9", journal_failing="1x9"),
    "not ready for a moment": _case("", 5, ready_journal="1 1 1 0 0 1", ready_arbiter="0 1x9"),
    "the arbiter is away": _case("MigrdArbiterDown", 4, ready_arbiter="0x9", arbiter_up="0x9"),
    "two hosts of one name": _case("MigrdNotReady", 4, ready_arbiter="0x9", arbiter_up="1x9"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_seen_raises_these_alerts_and_no_other(
    case: Case, promtool: Path, tmp_path: Path
) -> None:
    """A counter that appears with its first event has no increase, and is an alert all the same."""
    assert _firing(promtool, tmp_path, case) == case.fires


def test_every_alert_about_a_guest_is_seen_to_fire() -> None:
    fired = {name for case in CASES.values() for name in case.fires}
    about_hosts = {"MigrdDown", "MigrdEventLoopLate", "MigrdJournalSlow", "MigrdPeerDown"}
    seldom = {"MigrdLoadedCopyWaits", "MigrdRollbackStuck"}  # as MigrdHandoverStuck, another phase
    assert _names() == fired | about_hosts | seldom


def test_what_stops_loses_or_doubles_a_guest_is_a_page_and_nothing_else_is() -> None:
    blocks = RULES.read_text().split("- alert: ")[1:]
    assert {block.split("\n")[0] for block in blocks if "severity: page" in block} == {
        "MigrdDown",
        "MigrdGuestLost",
        "MigrdGuestRanTwice",
        "MigrdHandoverStuck",
        "MigrdLoadedCopyWaits",
        "MigrdNeedsOperator",
        "MigrdPostcopyFailed",
        "MigrdPostcopyPaused",
        "MigrdRollbackStuck",
    }


def _names() -> set[str]:
    return set(re.findall(r"- alert: (\w+)", RULES.read_text()))


def _firing(promtool: Path, tmp_path: Path, case: Case) -> frozenset[str]:
    """The alerts that stand: promtool is told to expect none, and complains of each."""
    rows = []
    for name, values in case.series.items():
        labelled = name.replace("{", '{instance="a",') if "{" in name else f'{name}{{instance="a"}}'
        rows.append({"series": labelled, "values": values})
    checks = [
        {"eval_time": f"{case.after_min}m", "alertname": name, "exp_alerts": []}
        for name in sorted(_names())
    ]
    test = {"interval": "1m", "input_series": rows, "alert_rule_test": checks}
    told = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [test]}
    file = tmp_path / "firing.yml"
    file.write_text(json.dumps(told))  # JSON is YAML
    done = subprocess.run(
        [promtool, "test", "rules", file], capture_output=True, text=True, timeout=60
    )
    found = frozenset(re.findall(r"alertname: (\w+)", done.stdout + done.stderr))
    assert (done.returncode != 0) is bool(found), (done.stdout, done.stderr)
    return found


# Conditions ---------------------------------------------------------------------------------------


def conditions() -> set[str]:
    """Every condition that a migration can show, found in the engine's code."""
    text = "".join(path.read_text() for path in ENGINE.glob("*.py"))
    named = re.findall(r"(?:trouble|hold_for|Condition)\(\s*\"([A-Z]\w+)\"", text)
    held = re.findall(r"^(?:CONDITION|UNREACHABLE|ELSEWHERE)(?:: Final)? = \"(\w+)\"", text, re.M)
    return {*named, *held, "Refused", "NotGoingOn"}


NO_ALERT = {"CancelRequested", "GuestStopped", "Refused"}
"""There is nothing to do about these."""
OF_READINESS = {"JournalFailing"}
"""Said by MigrdNotReady: the check `journal` is just this."""


def test_every_condition_that_hinders_a_migration_is_in_an_alert() -> None:
    found = re.findall(r'condition=~?"([^"]*)"', " ".join(_expressions()))
    asked = {word for text in found for word in text.split("|")}
    assert asked - {OTHER} == conditions() - NO_ALERT - OF_READINESS
    assert OTHER in asked, "one that was added later"


def test_every_cause_and_check_of_an_alert_is_one_that_there_is() -> None:
    code = "".join(path.read_text() for path in Path(migrd.__file__).parent.rglob("*.py"))
    found = re.findall(r'(?:reason|check)!?=~?"([^"]*)"', " ".join(_expressions()))
    assert {"guest_shut_down", "source_left_behind", "arbiter"} == set(found)
    for cause in ("guest_shut_down", "source_left_behind"):
        assert re.search(rf'(?:code=|Cause\()"{cause}"', code), cause
    assert 'Check("arbiter"' in code


def _named_in_readme(text: str) -> set[str]:
    return set(re.findall(r"`(?!Migrd)([A-Z][a-z]+(?:[A-Z][a-z]+)*)`", text))


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
